"""What the experiments share. No algorithm is here; those are in `vfjax`.

A script says what is measured and hands it to `experiment.Experiment`, whose docstring shows how.
"""
