"""The transformers model: configuration, model, image processor, processor, tokenizer.

The five files import one another by relative names only, so that they also work uploaded flat to the Hub.
"""


def register_auto_classes() -> None:
    """Makes transformers' Auto classes know `gpt_oss_vision` checkpoints. Calling it again changes nothing."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    from .configuration_gpt_oss_vision import GPTOSSVisionConfig
    from .modeling_gpt_oss_vision import GPTOSSVisionForCausalLM, GPTOSSVisionModel

    AutoConfig.register(GPTOSSVisionConfig.model_type, GPTOSSVisionConfig, exist_ok=True)
    AutoModel.register(GPTOSSVisionConfig, GPTOSSVisionModel, exist_ok=True)
    AutoModelForCausalLM.register(GPTOSSVisionConfig, GPTOSSVisionForCausalLM, exist_ok=True)
    AutoModelForImageTextToText.register(GPTOSSVisionConfig, GPTOSSVisionForCausalLM, exist_ok=True)
