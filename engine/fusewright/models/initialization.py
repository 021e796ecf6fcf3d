"""Initial weights."""

from torch import nn


def init_normal(model: nn.Module, std: float = 0.02) -> None:
    """Weights of linear maps and embeddings, packed projections included, normal with ``std``, their biases 0.

    Source: Radford et al., "Language models are unsupervised multitask learners", 2019; Devlin et al., "BERT", 2019.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.normal_(module.in_proj_weight, std=std)


def scale_residual_projections(model: nn.Module, std: float, sublayers: int) -> None:
    """The last map of each of ``sublayers`` residual branches normal with ``std / sqrt(sublayers)``.

    Source: Radford et al., "Language models are unsupervised multitask learners", 2019.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "linear2.weight")):
            nn.init.normal_(parameter, std=std / sublayers**0.5)
