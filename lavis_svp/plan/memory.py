"""Memory of one GPU: states that ZeRO shards, tensors that autograd keeps, and the peak of the frozen half."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lavis_svp.language.causal_lm import LanguageModel
from lavis_svp.models.svp_ris import SvpRis
from lavis_svp.plan.costs import sequences
from lavis_svp.plan.flops import LanguageShape, decode_mask, make_seg_prompts, parameters_by_part, project
from lavis_svp.plan.settings import TextLengths, TrainingSettings
from lavis_svp.superpixels.one_pass.generator import OnePassSuperpixels
from lavis_svp.superpixels.one_pass.head import EMBEDDING_CHANNELS, STRIDE, BoundaryHead
from lavis_svp.superpixels.sam.factored_decoder import GPU_BLOCK
from lavis_svp.superpixels.sam.generator import FULL_GRID, SamSuperpixels
from lavis_svp.vision.feature_extractor import superpixel_cache
from lavis_svp.vision.sam import STRIDE as SAM_STRIDE

FP32 = 4
HALF = 2
QUANTISED = {"8bit": 1.0, "4bit": 0.5}  # bytes of a weight of a matrix
BLOCK = 64  # weights that share a float32 scale in 4 bits; in 8 bits a row of the matrix does
BUCKET = 500_000_000  # DeepSpeed's default reduce_bucket_size and allgather_bucket_size, elements
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default stage3_max_live_parameters, elements
CONTEXT = 1.5e9  # CUDA context, NCCL and cuBLAS workspaces: an assumption
FRAGMENTATION = 0.05  # of all else: an assumption
LOGIT_BYTES = 12  # of one logit: as computed, in float32, its gradient
ATTENTION_NUMBERS = 3  # of one weight of SAM's global attention: product, with positions, softmax
PROMPT_NUMBERS = 460  # float32 numbers that the factored decoder holds for one prompt and image token,
UPSCALED_NUMBERS = 1150  # and for each of those whose logits are computed together; both counted on the meta device
MASK_BYTES = 16  # of one pixel of SAM's input in the mask losses: logits at full size, target, gradient


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float  # parameters
    gradients: float  # of trained parameters
    optimizer: float  # Adam's moments and, in 16 bits, the float32 copy
    buffers: float  # DeepSpeed's buckets, or DDP's
    language: float  # tensors of the language model that autograd keeps
    heads: float  # those of projector, prompt head, mask decoder, mask losses and logits
    frozen: float  # temporary peak of the frozen half, before autograd keeps anything
    other: float  # context and fragmentation

    @property
    def peak(self) -> float:
        """The larger of the frozen half's peak and of all that autograd keeps, on top of the permanent states."""
        static = self.weights + self.gradients + self.optimizer + self.buffers
        return static + max(self.frozen, self.language + self.heads) + self.other


def memory_per_gpu(
    model: SvpRis, shape: LanguageShape, tokens: int, text: TextLengths, training: TrainingSettings, num_gpus: int
) -> Memory:
    """Estimate the memory of one of the GPUs that share the states of a skeleton.

    Args:
        model: the skeleton.
        shape: of its language model.
        tokens: visual tokens of an image.
        text: lengths of the text.
        training: the run.
        num_gpus: number of GPUs.
    """
    counts = parameters_by_part(model)["whole model"]
    replicated, unsharded = (
        sum(p.numel() for name in names for p in getattr(model, name, nn.Module()).parameters())
        for names in (model.replicated_modules, model.unsharded_modules)
    )
    encoders, language_weights = half_weights(model)
    quantised, held = quantised_weights(model.language)
    language_weights = max(0, language_weights - quantised)
    rest = counts.total - quantised
    states = state_bytes(rest, counts.trained, training, num_gpus, replicated, unsharded, encoders, language_weights)
    states = (states[0] + held, *states[1:])
    rows, length = sequences(model.options.layout, tokens, text, training.expressions)
    images = training.batch_size
    width = FP32 if training.dtype == "fp32" else HALF
    one_layer = layer_bytes(model.language, rows * images, length, training.dtype)
    inputs = shape.layers * rows * images * length * shape.width * width
    language = inputs + one_layer if shape.checkpointing else shape.layers * one_layer
    heads = images * head_bytes(model, tokens, training.expressions)
    heads += images * training.expressions * text.answer * shape.vocabulary * LOGIT_BYTES
    frozen = 0.0 if model.options.cache_features else frozen_bytes(model, images)
    used = sum(states) + max(frozen, language + heads)
    return Memory(*states, language, heads, frozen, CONTEXT + FRAGMENTATION * used)


def half_weights(model: SvpRis) -> tuple[int, int]:
    """How many weights of the image encoders, and frozen ones of the language model, CUDA holds in 16 bits."""
    options, extractor = model.options, model.extractor
    encoders: list[tuple[str, nn.Module]] = [
        (options.vision_encoder.dtype, extractor.vision_encoder),
        (options.sam.dtype, extractor.sam_encoder),
    ]
    if extractor.classifier is not None:
        encoders.append((options.classifier.dtype, extractor.classifier))
    in_half = [module for dtype, module in encoders if dtype != "float32"]
    language = [] if options.language.dtype == "float32" else model.language.parameters()
    frozen = sum(parameter.numel() for parameter in language if not parameter.requires_grad)
    return sum(parameter.numel() for module in in_half for parameter in module.parameters()), frozen


def quantised_weights(language: LanguageModel) -> tuple[int, float]:
    """How many weights bitsandbytes quantises (the transformer's matrices), and their bytes with their scales."""
    if language.options.quantization == "none":
        return 0, 0.0
    modules = language.transformer.named_modules()
    linear = (module for name, module in modules if isinstance(module, nn.Linear) and "lora_" not in name)
    shapes = [module.weight.shape for module in linear]
    count = sum(rows * columns for rows, columns in shapes)
    scales = sum(rows for rows, _ in shapes) if language.options.quantization == "8bit" else count / BLOCK
    return count, count * QUANTISED[language.options.quantization] + scales * FP32


def state_bytes(
    total: int,
    trained: int,
    training: TrainingSettings,
    num_gpus: int,
    replicated: int = 0,
    unsharded: int = 0,
    half_encoders: int = 0,
    half_language: int = 0,
) -> tuple[float, float, float, float]:
    """Weights, gradients, optimizer states and communication buffers of one GPU.

    In 16 bits DeepSpeed holds 2 bytes per parameter, 2 per gradient, and 12 for the float32 copy and the moments.
    ZeRO-1 shards the last, ZeRO-2 also the gradients, ZeRO-3 also the parameters (arXiv 1910.02054). DDP keeps
    parameters, gradients and moments in float32, a 16-bit copy of trained weights under autocast, and its buckets.

    Args:
        total: parameters.
        trained: trained parameters.
        training: the run.
        num_gpus: N.
        replicated: frozen parameters outside of the engine, whole on every GPU at every stage
            (``SvpRis.replicated_modules``).
        unsharded: parameters inside the engine that ZeRO-3 leaves whole on every GPU (``SvpRis.unsharded_modules``).
        half_encoders: those of ``replicated`` in 16 bits.
        half_language: frozen parameters of the language model in 16 bits, which they are in DeepSpeed's engine anyway.
    """
    half = training.dtype != "fp32"
    if training.zero is None:
        copies = trained * HALF if half else 0
        weights = float(total * FP32 - (half_encoders + half_language) * HALF + copies)
        return weights, float(trained * FP32), float(trained * 2 * FP32), float(trained * FP32)
    width, moments = (HALF, 3 * FP32) if half else (FP32, 2 * FP32)
    stage, options = training.zero, training.zero_options
    shared = total - replicated - unsharded if stage == 3 else 0
    whole = FP32 * replicated - HALF * half_encoders + width * (total - replicated - shared)
    weights = whole + (0.0 if training.offloads("param") else width * shared / num_gpus)
    gradients = trained * width / (num_gpus if stage >= 2 else 1)
    optimizer = trained * moments / (num_gpus if stage >= 1 else 1)
    optimizer = 0.0 if training.offloads("optimizer") else optimizer
    reduce = min(trained, float(options.get("reduce_bucket_size", BUCKET)))
    gather = min(trained, float(options.get("allgather_bucket_size", BUCKET)))
    if stage == 3:
        gather = min(shared, float(options.get("stage3_max_live_parameters", LIVE_PARAMETERS)))
    return weights, gradients, optimizer, (reduce + gather) * width


def kept_bytes(run: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Count the bytes that autograd keeps for the backward pass of ``run``: each storage once, parameters excluded."""
    own = {_place(parameter) for parameter in parameters}
    kept: dict[int, Tensor] = {}  # while it holds them, their storage is not reused

    def pack(tensor: Tensor) -> Tensor:
        if _place(tensor) not in own:
            kept.setdefault(_place(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def layer_bytes(language: LanguageModel, rows: int, length: int, dtype: str) -> int:
    """Bytes that autograd keeps of one decoder layer and the final norm, counted on the real modules.

    Args:
        language: built without weights; a copy of it runs.
        rows: number of sequences.
        length: L of each.
        dtype: "fp32", else 16 bits.
    """
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    transformer = language.transformer
    one = copy.copy(transformer)
    one._modules = {**transformer._modules, "layers": transformer.layers[:1]}
    one = copy.deepcopy(one).to(kind)
    one.gradient_checkpointing_disable()
    one.config.num_hidden_layers = 1
    with FakeTensorMode(allow_non_fake_inputs=True):
        one = one.to_empty(device="cpu")
        states = torch.zeros(rows, length, language.dim, dtype=kind, requires_grad=True)
        mask = torch.zeros(rows, 1, length, length, dtype=kind)
        positions = torch.arange(length)[None].expand(rows, -1)
        inputs = {"inputs_embeds": states, "attention_mask": mask, "position_ids": positions, "use_cache": False}
        return kept_bytes(lambda: one(**inputs), one.parameters())


def head_bytes(model: SvpRis, tokens: int, expressions: int) -> int:
    """Bytes that autograd keeps of projector, prompt head, mask decoder and mask losses for one image, in float32."""
    encoder, side = model.extractor.vision_encoder, model.options.sam.side
    drawn = min(expressions, model.options.sam.max_masks_per_image or expressions)

    def trained_half() -> None:
        features = encoder(torch.empty(1, 3, side, side))
        visual = project(model, features, tokens)
        embedding = torch.empty(1, model.mask_decoder.point_token.shape[0], *model.extractor.sam_encoder.grid)
        kept.extend(decode_mask(model, embedding, make_seg_prompts(model, visual)) for _ in range(drawn))

    kept: list[Tensor] = []
    modules = nn.ModuleList([model.projector, model.seg_prompt, model.mask_decoder])
    with torch.device("meta"):
        counted = kept_bytes(trained_half, modules.parameters())
    return counted + drawn * side * side * MASK_BYTES


def frozen_bytes(model: SvpRis, images: int = 1) -> float:
    """Temporary peak of SAM's image encoder, or of the superpixels.

    SAM's encoder and its automatic masks take images one by one: the encoder's global attention materialises all its
    weights, and the decoder works through point prompts in chunks. A boundary head takes all images together.
    Superpixels that are read from a store take nothing.

    Args:
        model: the skeleton.
        images: in a micro-batch.
    """
    image_tokens = math.prod(model.extractor.sam_encoder.grid)
    network, generator = model.extractor.sam_encoder.network, model.extractor.generator
    encoder = superpixels = 0.0
    made = superpixel_cache(model.options.superpixels) == "off"
    if isinstance(network, ImageEncoderViT):
        width = FP32 if model.options.sam.dtype == "float32" else HALF
        encoder = network.blocks[0].attn.num_heads * image_tokens**2 * ATTENTION_NUMBERS * width
    if isinstance(generator, SamSuperpixels) and made:
        prompts = max(1, generator.options.prompts_per_call("cuda") * FULL_GRID // image_tokens)
        superpixels = (prompts * image_tokens * PROMPT_NUMBERS + GPU_BLOCK * UPSCALED_NUMBERS) * FP32
    if isinstance(generator, OnePassSuperpixels) and made:
        superpixels = images * boundary_head_bytes(generator.loaded.head, model.options.sam.side)
    return float(max(encoder, superpixels))


def boundary_head_bytes(head: BoundaryHead, side: int) -> int:
    """At most so many bytes of activations of a boundary head on one image: what all convolutions read and write.

    Args:
        head: whose copy runs on the meta device.
        side: SAM's input side in pixels.
    """
    numbers: list[int] = []
    head = copy.deepcopy(head).to("meta")
    for module in head.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda _, inputs, output: numbers.append(inputs[0].numel() + output.numel()))
    grid, cells = side // SAM_STRIDE, side // STRIDE
    with torch.device("meta"):
        head(torch.empty(1, EMBEDDING_CHANNELS, grid, grid), torch.empty(1, 3, cells, cells))
    return sum(numbers) * FP32
