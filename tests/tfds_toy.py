"""A TensorFlow dataset made on the spot: `toy_text/full` has two splits, `toy_text/bare` one."""

import numpy as np
import tensorflow_datasets as tfds

TRAIN = [f"Line {i} of the toy: söme words, {i * i} and more.\n" for i in range(40)]
VALIDATION = [f"Held out {i}.\n" for i in range(20)]


class ToyText(tfds.core.GeneratorBasedBuilder):
    """Short documents and a number each."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="full"), tfds.core.BuilderConfig(name="bare"))

    def _info(self):
        features = {"text": tfds.features.Text(), "number": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        splits = {"train": self._generate_examples(TRAIN)}
        if self.builder_config.name == "full":
            splits["validation"] = self._generate_examples(VALIDATION)
        return splits

    def _generate_examples(self, texts):
        for i, text in enumerate(texts):
            yield i, {"text": text, "number": i}
