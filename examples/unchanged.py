"""Trains a small CNN on handwritten digits: a plain Keras script without mixed precision.

    python examples/unchanged.py [--epochs 4] [--batch 32]
    tfmixed run --policy mixed_float16 examples/unchanged.py [--epochs 4] [--batch 32]

The second command trains in float16 with a loss scale, a float32 softmax, a log and a report. See docs/run.md.
"""

from __future__ import annotations

import argparse

import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def digits():
    """Returns 1,437 training and 360 test images of 8x8 pixels in [0, 1], with their labels."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(images.reshape(-1, 8, 8, 1) / 16, labels, test_size=360, random_state=0, stratify=labels)


def build() -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.Conv2D(16, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    train_x, test_x, train_y, test_y = digits()
    model = build()
    model.compile(keras.optimizers.Adam(5e-3), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(train_x, train_y, batch_size=arguments.batch, epochs=arguments.epochs, verbose=2)
    accuracy = model.evaluate(test_x, test_y, verbose=0, return_dict=True)["accuracy"]
    print(f"test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
