"""transformers' common model, generation, training and configuration tests on our classes: on text, and with images."""

import unittest

import torch

import mixins
from gpt_oss_vision.bridge.hf import register_auto_classes
from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM, GPTOSSVisionModel
from tiny import tiny_config

common = mixins.load("test_modeling_common")
generation = mixins.load("generation.test_utils")
configuration = mixins.load("test_configuration_common")
training = mixins.load("test_training_mixin")


class ModelTester:
    """The interface that the mixins need: classes, a config, a batch and its sizes."""

    base_model_class = GPTOSSVisionModel
    causal_lm_class = GPTOSSVisionForCausalLM
    batch_size = 3
    seq_length = 13
    is_training = True
    num_hidden_layers = 2

    def __init__(self, use_vision: bool):
        self.use_vision = use_vision
        for name in ("vocab_size", "hidden_size", "num_attention_heads"):
            setattr(self, name, getattr(self.get_config(), name))

    def get_config(self) -> GPTOSSVisionConfig:
        # The placeholder has a small id, since the tests truncate the vocabulary; the window is gpt-oss's own.
        return tiny_config(
            use_vision=self.use_vision,
            num_hidden_layers=self.num_hidden_layers,
            sliding_window=128,
            max_position_embeddings=512,
            image_token_id=3,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[GPTOSSVisionConfig, dict[str, torch.Tensor]]:
        """One image per row, at its start, as in transformers' own tests of models with images."""
        config = self.get_config()
        input_ids = torch.randint(4, self.vocab_size, (self.batch_size, self.seq_length))
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids).tril()}
        if self.use_vision:
            input_ids[:, : config.num_image_tokens] = config.image_token_id
            inputs["pixel_values"] = torch.randn(self.batch_size, 3, 8, 8)
        return config, inputs


class CommonTests(common.ModelTesterMixin, generation.GenerationTesterMixin):
    all_model_classes = (GPTOSSVisionModel, GPTOSSVisionForCausalLM)
    model_tester = None
    _is_stateful = True
    model_split_percents = (0.5, 0.6)

    @classmethod
    def setUpClass(cls) -> None:
        register_auto_classes()

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.use_vision)

    def test_config(self) -> None:
        configuration.ConfigTester(self, GPTOSSVisionConfig, use_vision=self.use_vision).run_common_tests()

    def test_reverse_loading_mapping(self) -> None:
        super().test_reverse_loading_mapping(check_keys_were_modified=False)


class TextTest(CommonTests, training.TrainingTesterMixin, unittest.TestCase):
    use_vision = False

    def _image_features_prepare_config_and_inputs(self) -> None:
        self.skipTest("without a tower there are no image features")


class ImageTextTest(CommonTests, unittest.TestCase):
    use_vision = True
    _is_composite = True

    @unittest.skip("it sets sdpa, which would drop the sinks and is refused")
    def test_can_set_attention_dynamically_composite_model(self) -> None: ...
