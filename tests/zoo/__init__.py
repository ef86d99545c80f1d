"""Small networks in the style of published packages, and the laws that hold for all of them.

How packages write their operations is what matters here: what normalises, reshapes, transposes,
maps over examples or gathers. Each network is plain JAX, so that no package has to be installed.
"""
