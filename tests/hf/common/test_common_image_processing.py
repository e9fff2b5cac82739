"""transformers' common image processor tests on ours, for a tower of RGB images."""

import unittest
from typing import Any

import mixins
from gpt_oss_vision.bridge.hf import register_auto_classes
from gpt_oss_vision.bridge.hf.image_processing_gpt_oss_vision import GPTOSSVisionImageProcessor

common = mixins.load("test_image_processing_common")


class ImageProcessorTester:
    """The interface that the mixin needs: the arguments of the processor, images, and the shape of the output."""

    batch_size = 5
    num_channels = 3

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        return {
            "size": {"height": 18, "width": 24},
            "image_mean": [0.5, 0.4, 0.3],
            "image_std": [0.2, 0.3, 0.4],
        }

    def expected_output_image_shape(self, images: Any) -> tuple[int, int, int]:
        return 3, 18, 24

    def prepare_image_inputs(self, **kwargs: Any) -> list[Any]:
        fields = {"batch_size": self.batch_size, "num_channels": self.num_channels}
        return common.prepare_image_inputs(min_resolution=30, max_resolution=400, **fields, **kwargs)


class ImageProcessingTest(common.ImageProcessingTestMixin, unittest.TestCase):
    test_cast_dtype = True

    @classmethod
    def setUpClass(cls) -> None:
        register_auto_classes()

    def setUp(self) -> None:
        self.image_processing_classes = {"pil": GPTOSSVisionImageProcessor}
        self.image_processor_tester = ImageProcessorTester()

    @property
    def image_processor_dict(self) -> dict[str, Any]:
        return self.image_processor_tester.prepare_image_processor_dict()

    @unittest.skip("an array of 4 channels is RGBA, and is laid on white like every other transparent image")
    def test_call_numpy_4_channels(self) -> None: ...
