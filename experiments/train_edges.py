r"""Trains the edge models that the experiments merge, and writes them as checkpoints with cards.

The shipped ones, each about as long as its card says, by `python experiments/train_edges.py` and

    --model vgg16 --width 0.25 --seeds 0 1 2
    --model resnet20 --width 0.5 --seeds 0 1
    --model vgg16-bn --width 0.125 --seeds 0 1 --epochs 14 --storage float16
    --model vgg16-ln --width 0.125 --seeds 0 1 --epochs 14 --storage float16
    --model resnet20-ln --width 0.25 --seeds 0 1 --epochs 8 --learning-rate 0.02 --storage float16
    --model convnext-pico --width 0.5 --seeds 0 1 --epochs 16 --storage float16
    --model vgg7-bn --width 0.5 --classes 0 1 2 3 4 --seeds 0 --dimensions 32 --epochs 12 \
        --storage float16
    --model vgg7-bn --width 0.5 --classes 5 6 7 8 9 --seeds 1 --dimensions 32 --epochs 12 \
        --storage float16
    --model digits-mlp --seeds 0 1
    --model digits-conv --seeds 0 1

Rate and length of the ResNet20 with LayerNorm are what two cores had time for: at 0.1 it had not
begun to learn after three epochs, and 0.005 to 0.05 made no difference to how it began, as seen on
training images. With `--classes` a network is trained on these alone, to point at their embeddings.
Folders of networks whose recipe was changed, as `cifar10-vgg16-w0.25-decay1e-4-seed0` by
`--weight-decay`, were named by hand.

A run that is stopped, at any moment and by anything, goes on where it was when it is started again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kit import cli, experiment, timing, training


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Trains and saves; returns the folders of the checkpoints."""
    doc = __doc__.split("\n\n")[0]
    with experiment.reported("train_edges.py"), timing.logs_above_bars():
        return training.run(cli.parse(training.Training, "train_edges.py", doc, argv))


if __name__ == "__main__":
    main()
