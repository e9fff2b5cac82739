"""The transformers model: configuration, model, image processor, processor, tokenizer.

The five files import only one another, by relative names, so that they also work when uploaded to the Hub.
"""


def register_auto_classes() -> None:
    """Register `gpt_oss_vision` in transformers' Auto classes. Idempotent."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
        AutoTokenizer,
    )
    from transformers.models.auto import modeling_auto

    from .configuration_gpt_oss_vision import GPTOSSVisionConfig
    from .image_processing_gpt_oss_vision import GPTOSSVisionImageProcessor
    from .modeling_gpt_oss_vision import GPTOSSVisionForCausalLM, GPTOSSVisionModel
    from .processing_gpt_oss_vision import GPTOSSVisionProcessor
    from .tokenization_gpt_oss_vision import GPTOSSVisionTokenizer

    AutoConfig.register(GPTOSSVisionConfig.model_type, GPTOSSVisionConfig, exist_ok=True)
    AutoModel.register(GPTOSSVisionConfig, GPTOSSVisionModel, exist_ok=True)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(GPTOSSVisionConfig, GPTOSSVisionForCausalLM, exist_ok=True)
    image_processors = {"torchvision": GPTOSSVisionImageProcessor, "pil": GPTOSSVisionImageProcessor}
    AutoImageProcessor.register(GPTOSSVisionConfig, image_processor_classes=image_processors, exist_ok=True)
    AutoProcessor.register(GPTOSSVisionConfig, GPTOSSVisionProcessor, exist_ok=True)
    AutoTokenizer.register(GPTOSSVisionConfig, GPTOSSVisionTokenizer, exist_ok=True)
    # The Trainer, pipelines and `transformers serve` look the class up by name in these tables.
    modeling_auto.MODEL_MAPPING_NAMES[GPTOSSVisionConfig.model_type] = GPTOSSVisionModel.__name__
    for names in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        names[GPTOSSVisionConfig.model_type] = GPTOSSVisionForCausalLM.__name__
