"""transformers' common processor tests on ours, with a tokenizer trained on a few words."""

import unittest
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image

import mixins
from gpt_oss_vision.bridge.hf import register_auto_classes
from gpt_oss_vision.bridge.hf.image_processing_gpt_oss_vision import GPTOSSVisionImageProcessor
from gpt_oss_vision.bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from gpt_oss_vision.bridge.hf.tokenization_gpt_oss_vision import GPTOSSVisionTokenizer
from tiny import tiny_processor

common = mixins.load("test_processing_common")


class ProcessingTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = GPTOSSVisionProcessor

    @classmethod
    def setUpClass(cls) -> None:
        register_auto_classes()
        super().setUpClass()
        # By default the tests download their images.
        images = [str(Path(cls.tmpdirname) / f"{name}.png") for name in ("first", "second")]
        for image in images:
            Image.new("RGB", (40, 30), "green").save(image)
        cls.enterClassContext(mock.patch.dict(common.MODALITY_INPUT_DATA, images=images))

    @classmethod
    def _setup_image_processor(cls) -> GPTOSSVisionImageProcessor:
        return GPTOSSVisionImageProcessor()

    @classmethod
    def _setup_tokenizer(cls) -> GPTOSSVisionTokenizer:
        return tiny_processor().tokenizer

    @classmethod
    def _setup_test_attributes(cls, processor: GPTOSSVisionProcessor) -> None:
        cls.image_token = processor.image_token

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        return {"num_image_tokens": 6}
