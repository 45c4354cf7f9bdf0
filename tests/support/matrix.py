"""The healthy matrix: configurations on which the probe must judge, find nothing and change nothing.

One table for the tests and for the comparison of tools. Every case is a plain loop over a tiny real model that is made
from a configuration, so nothing is downloaded.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

VOCABULARY, LENGTH, STEPS = 32, 8, 7
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, **SMALL}
CAUSAL = {**TEXT, "num_key_value_heads": 1, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# What every healthy run of LoRA in a plain loop can be judged on; the others need a declaration, several ranks,
# 16-bit adapters, autocast, an estimator, or a second adapter.
ESSENTIAL = frozenset(f"LP{n}" for n in (*range(101, 107), 201, 202, 203, 209, 301, 302, 303, 401, 402, 404, 501))


@dataclass
class Run:
    """A healthy training run.

    Attributes:
        model: What is trained, or several models.
        loss: Of the model, the token ids of a batch and its number.
        optimizer: Made from the model.
        after_step: What else a loop does after a step, with the model and the number of the step.
        steps: How many steps are made.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Tensor, int], Tensor]
    optimizer: Callable[[nn.Module], Optimizer]
    after_step: Callable[[nn.Module, int], None] = lambda model, step: None
    steps: int = STEPS

    def fit(self, around: Callable[[nn.Module, Optimizer], AbstractContextManager[Any]] | None = None) -> Any:
        """Train; returns what ``around`` gave when it was entered around the loop."""
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(1)
        optimizer = self.optimizer(self.model)
        with around(self.model, optimizer) if around else nullcontext() as entered:
            for step in range(self.steps):
                ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
                self.loss(self.model, ids, step).backward()
                optimizer.step()
                optimizer.zero_grad()
                self.after_step(self.model, step)
        return entered


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        name: Kind and name.
        build: Makes the run; given a folder for the cases that load a quantised base from a file.
        but: Codes that cannot be judged in it.
        intent: Keyword arguments of the probe.
        lora: The adapter is LoRA: all essential checks must have passed.
        judged: The tuner has tuner layers; of others it is said that they cannot be judged.
    """

    name: str
    build: Callable[[Path], Run]
    but: frozenset[str] = frozenset()
    intent: dict[str, Any] = field(default_factory=dict)
    lora: bool = True
    judged: bool = True

    def make(self, folder: Path) -> Run:
        """Build the run, from the same random state each time."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, of the very settings that are the case
            return self.build(folder)


CASES: list[Case] = []


def case(
    name: str, *, but: str = "", lora: bool = True, judged: bool = True, **intent: Any
) -> Callable[[Callable[[Path], Run]], Callable[[Path], Run]]:
    """Enter a builder of a run into the table."""

    def enter(build: Callable[[Path], Run]) -> Callable[[Path], Run]:
        CASES.append(Case(name, build, frozenset(but.split()), intent, lora, judged))
        return build

    return enter


# --- parts ---------------------------------------------------------------------------------------


def tokens_loss(model: nn.Module, ids: Tensor, step: int) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def adamw(model: nn.Module, **settings: Any) -> Optimizer:
    return AdamW([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-3, **settings})


def llama(**changes: Any) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**CAUSAL, **changes}))


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes})


def run(model: nn.Module, loss: Callable[..., Tensor] = tokens_loss, optimizer: Any = adamw, **more: Any) -> Run:
    return Run(model, loss, optimizer, **more)


def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).sum(-1)


# --- architectures -------------------------------------------------------------------------------

DECODERS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "llama": ("Llama", ["q_proj", "v_proj"], {}),
    "mistral": ("Mistral", ["q_proj", "v_proj"], {"sliding_window": 4}),
    "qwen2": ("Qwen2", ["q_proj", "o_proj"], {}),
    "qwen3": ("Qwen3", ["q_proj", "down_proj"], {"head_dim": 8}),
    "gemma": ("Gemma", ["q_proj", "v_proj"], {"head_dim": 8}),
    "gemma2": ("Gemma2", ["q_proj", "up_proj"], {"head_dim": 8, "sliding_window": 4}),
    "phi3": ("Phi3", ["qkv_proj", "gate_up_proj"], {}),
    "phi": ("Phi", ["q_proj", "dense"], {"num_key_value_heads": 2}),
    "gpt_neox": ("GPTNeoX", ["query_key_value"], {}),
    "opt": ("OPT", ["q_proj", "fc1"], {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "olmo2": ("Olmo2", ["q_proj", "v_proj"], {}),
}


def decoder(kind: str, targets: list[str], changes: dict[str, Any]) -> Callable[[Path], Run]:
    def build(folder: Path) -> Run:
        settings = getattr(tf, f"{kind}Config")(**{**CAUSAL, **changes})
        return run(get_peft_model(getattr(tf, f"{kind}ForCausalLM")(settings), config(target_modules=targets)))

    return build


for _name, _decoder in DECODERS.items():
    case(f"architecture {_name}")(decoder(*_decoder))


@case("architecture gpt2")
def gpt2(folder: Path) -> Run:
    settings = tf.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, use_cache=False)
    return run(get_peft_model(tf.GPT2LMHeadModel(settings), config(target_modules=["c_attn", "c_proj"])))


@case("architecture t5")
def t5(folder: Path) -> Run:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    settings = tf.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    return run(get_peft_model(tf.T5ForConditionalGeneration(settings), config(target_modules=["q", "v"])))


@case("architecture bart")
def bart(folder: Path) -> Run:
    sizes = {f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16, "max_position_embeddings": 32}
    settings = tf.BartConfig(vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=2, decoder_start_token_id=2, **sizes)
    return run(get_peft_model(tf.BartForConditionalGeneration(settings), config()))


def classify(model: nn.Module, ids: Tensor, step: int) -> Tensor:
    return model(input_ids=ids, labels=torch.tensor([0, 1])).loss


@case("architecture bert, a classifier")
def bert(folder: Path) -> Run:
    base = tf.BertForSequenceClassification(tf.BertConfig(**TEXT))
    return run(get_peft_model(base, config(target_modules=["query", "value"], task_type="SEQ_CLS")), classify)


@case("architecture roberta, masked language model")
def roberta(folder: Path) -> Run:
    base = tf.RobertaForMaskedLM(tf.RobertaConfig(**TEXT, pad_token_id=0))
    return run(get_peft_model(base, config(target_modules=["query", "value"])))


def pixels(ids: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(ids.sum())))


@case("architecture vit")
def vit(folder: Path) -> Run:
    base = tf.ViTForImageClassification(tf.ViTConfig(image_size=8, patch_size=4, **SMALL))
    attention = {n.rsplit(".", 1)[-1] for n, m in base.named_modules() if isinstance(m, nn.Linear) and "attention" in n}

    def loss(model: nn.Module, ids: Tensor, step: int) -> Tensor:
        return model(pixel_values=pixels(ids, 2, 3, 8, 8), labels=torch.tensor([0, 1])).loss

    model = get_peft_model(base, config(target_modules=sorted(attention)[:2], modules_to_save=["classifier"]))
    return run(model, loss)


@case("architecture clip, two towers")
def clip(folder: Path) -> Run:
    text = tf.CLIPTextConfig(**TEXT, bos_token_id=1, eos_token_id=2)
    vision = tf.CLIPVisionConfig(image_size=8, patch_size=4, **SMALL)
    base = tf.CLIPModel(tf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))

    def loss(model: nn.Module, ids: Tensor, step: int) -> Tensor:
        return model(input_ids=ids, pixel_values=pixels(ids, 2, 3, 8, 8), return_loss=True).loss

    return run(get_peft_model(base, config()), loss)


@case("architecture whisper")
def whisper(folder: Path) -> Run:
    sizes = {f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    settings = tf.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=4,
        d_model=16,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
        **sizes,
    )

    def loss(model: nn.Module, ids: Tensor, step: int) -> Tensor:
        return model(input_features=pixels(ids, 2, 4, 16), labels=ids).loss

    return run(get_peft_model(tf.WhisperForConditionalGeneration(settings), config()), loss)


@case("architecture mamba")
def mamba(folder: Path) -> Run:
    settings = tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, use_cache=False)
    return run(get_peft_model(tf.MambaForCausalLM(settings), config(target_modules=["in_proj", "x_proj"])))


@case("architecture qwen3-moe, fused experts")
def mixture(folder: Path) -> Run:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    base = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**{**CAUSAL, **sizes}))
    return run(get_peft_model(base, config(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])))


@case("architecture llava, text only", but="LP104")
def llava(folder: Path) -> Run:
    vision = tf.CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=8, **SMALL)
    settings = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**CAUSAL), image_token_id=3)
    base = tf.LlavaForConditionalGeneration(settings)
    return run(get_peft_model(base, config()), lambda model, ids, step: tokens_loss(model, ids.clamp(min=4), step))


# --- variants of LoRA ----------------------------------------------------------------------------

EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Without LoftQ, whose initialisation needs a GPU (peft 0.21), and QA-LoRA, whose base is a GPTQ one.
VARIANTS: dict[str, dict[str, Any]] = {
    "dropout": {"lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, fast": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "mica": {"init_lora_weights": "mica"},
    "B not zero": {"init_lora_weights": False},
    "all-linear": {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "a regular expression": {"target_modules": r".*\.0\..*_proj"},
    "exclude_modules": {"target_modules": EVERY_LINEAR, "exclude_modules": ["down_proj"]},
    "rank_pattern and alpha_pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "lora_bias": {"lora_bias": True},
    "bias lora_only": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "modules_to_save, embeddings": {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": EVERY_LINEAR},
    "trainable tokens": {"trainable_token_indices": list(range(3, VOCABULARY))},
    "target_parameters": {"target_parameters": ["mlp.gate_proj.weight"]},
    "kasa": {"kasa_config": peft.KasaConfig()},
    "velora": {"velora_config": peft.VeloraConfig(num_groups=4)},
    "monteclora": {"monteclora_config": peft.MontecloraConfig(num_samples=2, buffer_size=20)},
    "rank 1": {"r": 1},
    "rank above the width": {"r": 32},
}


def variant(changes: dict[str, Any]) -> Callable[[Path], Run]:
    return lambda folder: run(get_peft_model(llama(), config(**copy.deepcopy(changes))))


for _name, _changes in VARIANTS.items():
    case(f"lora {_name}")(variant(_changes))


@case("lora alora")
def alora(folder: Path) -> Run:
    """The adapter acts from the invocation token on; a batch without one gives it nothing to learn."""

    def loss(model: nn.Module, ids: Tensor, step: int) -> Tensor:
        ids[:, 2] = 3
        return tokens_loss(model, ids, step)

    return run(get_peft_model(llama(), config(alora_invocation_tokens=[3], task_type="CAUSAL_LM")), loss)


@case("lora eva")
def eva(folder: Path) -> Run:
    base = llama()
    settings = config(init_lora_weights="eva", eva_config=peft.EvaConfig(), task_type="CAUSAL_LM")
    model = get_peft_model(base, settings, low_cpu_mem_usage=True)
    batches = [{"input_ids": torch.randint(3, VOCABULARY, (8, LENGTH))} for _ in range(20)]
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return run(model)


@case("lora corda")
def corda(folder: Path) -> Run:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    base = llama()
    settings = config(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))

    def forwards() -> None:
        for _ in range(4):
            base(input_ids=torch.randint(3, VOCABULARY, (1, LENGTH)))

    with torch.no_grad():
        preprocess_corda(base, settings, run_model=forwards)
    return run(get_peft_model(base, settings))


@case("lora lora-ga")
def lora_ga(folder: Path) -> Run:
    from peft.tuners.lora.loraga import preprocess_loraga

    base = llama()
    settings = config(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    ids = torch.randint(3, VOCABULARY, (8, LENGTH))
    preprocess_loraga(base, settings, lambda: tokens_loss(base, ids, 0).backward())
    return run(get_peft_model(base, settings))


@case("lora-fa by its optimizer")
def lora_fa(folder: Path) -> Run:
    model = get_peft_model(llama(), config())
    return run(model, optimizer=lambda model: create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3))


@case("lora-fa by hand")
def frozen_a(folder: Path) -> Run:
    model = get_peft_model(llama(), config())
    for name, tensor in model.named_parameters():
        tensor.requires_grad_("lora_B" in name)
    return run(model)


@case("lora+")
def lora_plus(folder: Path) -> Run:
    model = get_peft_model(llama(), config())
    return run(model, optimizer=lambda m: create_loraplus_optimizer(m, AdamW, lr=1e-3, loraplus_lr_ratio=16))


@case("lora tied embeddings")
def tied(folder: Path) -> Run:
    return run(get_peft_model(llama(tie_word_embeddings=True), config(target_modules=["q_proj", "embed_tokens"])))


@case("lora bfloat16 base")
def bfloat16(folder: Path) -> Run:
    return run(get_peft_model(llama().to(torch.bfloat16), config()))


@case("lora unfrozen norms")
def norms(folder: Path) -> Run:
    model = get_peft_model(llama(), config())
    for name, tensor in model.named_parameters():
        if "norm" in name:
            tensor.requires_grad_(True)
    return run(model)


@case("lora native to transformers")
def native(folder: Path) -> Run:
    model = llama()
    model.add_adapter(config())
    return run(model)


@case("lora injected, no PeftModel")
def injected(folder: Path) -> Run:
    return run(peft.inject_adapter_in_model(config(), llama()))


# --- quantised -----------------------------------------------------------------------------------


def quantised(kind: str, targets: list[str]) -> Callable[[Path], Run]:
    def build(folder: Path) -> Run:
        path = folder / "base"
        if not path.exists():
            llama(hidden_size=64, intermediate_size=64).save_pretrained(path)
        torch.manual_seed(0)
        how = (
            tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
            if kind == "nf4"
            else tf.BitsAndBytesConfig(load_in_8bit=True)
        )
        base = tf.LlamaForCausalLM.from_pretrained(path, quantization_config=how, device_map={"": "cpu"})
        base = peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
        return run(get_peft_model(base, config(target_modules=targets)).train())

    return build


case("quantised nf4")(quantised("nf4", ["q_proj", "v_proj"]))
case("quantised nf4, every linear")(quantised("nf4", EVERY_LINEAR))
case("quantised int8")(quantised("int8", ["q_proj", "v_proj"]))


# --- other tuners --------------------------------------------------------------------------------

QV = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
LM = {"task_type": "CAUSAL_LM"}
SQUARE = {"target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
TUNERS: dict[str, peft.PeftConfig] = {
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=3, **LM),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=3, **LM),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **LM),
    "adaption prompt": peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, **LM),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **LM),
    "loha": peft.LoHaConfig(r=4, **QV),
    "lokr": peft.LoKrConfig(r=4, **QV),
    "oft": peft.OFTConfig(oft_block_size=8, **QV),
    "boft": peft.BOFTConfig(boft_block_size=4, **SQUARE),
    "hra": peft.HRAConfig(r=4, **QV),
    "vera": peft.VeraConfig(r=4, **SQUARE),
    "vb-lora": peft.VBLoRAConfig(r=4, topk=2, num_vectors=8, vector_length=4, **SQUARE),
    "fourierft": peft.FourierFTConfig(n_frequency=10, **QV),
    "c3a": peft.C3AConfig(block_size=8, **SQUARE),
    "shira": peft.ShiraConfig(r=2, **QV),
    "road": peft.RoadConfig(group_size=4, **QV),
    "miss": peft.MissConfig(r=4, **QV),
    "randlora": peft.RandLoraConfig(r=4, **SQUARE),
    "delora": peft.DeloraConfig(r=4, **QV),
    "waveft": peft.WaveFTConfig(n_frequency=10, **SQUARE),
    "hira": peft.HiraConfig(r=4, **QV),
    "gralora": peft.GraloraConfig(r=4, gralora_k=2, **QV),
    "layer norms": peft.LNTuningConfig(target_modules=["input_layernorm"], **LM),
    "trainable tokens": peft.TrainableTokensConfig(token_indices=list(range(3, VOCABULARY))),
}


def tuner(settings: peft.PeftConfig) -> Callable[[Path], Run]:
    return lambda folder: run(get_peft_model(llama(), copy.deepcopy(settings)))


for _name, _tuner in TUNERS.items():
    case(f"tuner {_name}", lora=False, judged=_name != "adaption prompt")(tuner(_tuner))


@case("tuner adalora", lora=False)
def adalora(folder: Path) -> Run:
    ranks = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": STEPS}
    model = get_peft_model(llama(), peft.AdaLoraConfig(**QV, **ranks))

    def optimizer(model: nn.Module) -> Optimizer:
        made = adamw(model)
        # It reads the gradients: after the step, and before they are cleared.
        made.register_step_post_hook(lambda *_: model.base_model.update_and_allocate(next(steps)))
        return made

    steps = itertools.count(1)
    return run(model, optimizer=optimizer)


@case("tuner x-lora", lora=False, judged=False)
def x_lora(folder: Path) -> Run:
    for name in ("one", "two"):
        if not (folder / name).exists():
            adapter = get_peft_model(llama(), config(init_lora_weights=False, task_type="CAUSAL_LM"))
            adapter.save_pretrained(folder / name)
    torch.manual_seed(0)
    settings = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=16,
        xlora_depth=1,
        adapters={str(i): str(folder / name) for i, name in enumerate(("one", "two"))},
    )
    return run(get_peft_model(llama(), settings))


# --- methods -------------------------------------------------------------------------------------


@case("method dpo, reference by disabled adapter")
def dpo(folder: Path) -> Run:
    def loss(model: nn.Module, ids: Tensor, step: int) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            reference = log_probabilities(model, ids)
        margin = log_probabilities(model, ids) - reference
        return -nn.functional.logsigmoid(0.5 * (margin[:1] - margin[1:])).mean()

    return run(get_peft_model(llama(), config()), loss)


@case("method dpo, reference adapter", reference_adapters=("reference",))
def dpo_two(folder: Path) -> Run:
    model = get_peft_model(llama(), config())
    model.add_adapter("reference", config())

    def loss(model: nn.Module, ids: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            model.set_adapter("reference")
            reference = log_probabilities(model, ids)
            model.set_adapter("default")
        margin = log_probabilities(model, ids) - reference
        return -nn.functional.logsigmoid(0.5 * (margin[:1] - margin[1:])).mean()

    return run(model, loss)


@case("method grpo, with groups of equal rewards")
def grpo(folder: Path) -> Run:
    def loss(model: nn.Module, ids: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            responses = model.generate(input_ids=ids, max_new_tokens=2, do_sample=True)
        advantage = torch.zeros(2) if step in (0, 1, 4) else torch.tensor([1.0, -1.0])
        return -(advantage * log_probabilities(model, responses)).mean()

    return run(get_peft_model(llama(), config()), loss, steps=9)


@case("method several active adapters")
def several(folder: Path) -> Run:
    model = get_peft_model(llama(), config())
    model.add_adapter("second", config(r=2))
    model.base_model.set_adapter(["default", "second"])
    return run(model)


@case("method adapters in turns", adapter=("default", "second"))
def turns(folder: Path) -> Run:
    model = get_peft_model(llama(), config())
    model.add_adapter("second", config())

    def loss(model: nn.Module, ids: Tensor, step: int) -> Tensor:
        model.set_adapter(("default", "second")[step % 2])
        return tokens_loss(model, ids, step)

    def optimizer(model: nn.Module) -> Optimizer:
        return AdamW([p for n, p in model.named_parameters() if "lora_" in n], lr=1e-3)

    return run(model, loss, optimizer, steps=12)


@case("method ema adapter", lagged_adapters=("teacher",))
def ema_adapter(folder: Path) -> Run:
    model = get_peft_model(llama(), config())
    model.add_adapter("teacher", config())

    def follow(model: nn.Module, step: int) -> None:
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in named.items():
                if ".teacher." in name:
                    tensor.lerp_(named[name.replace(".teacher.", ".default.")], 0.1)

    return run(model, after_step=follow)


@case("method ema copy of the model")
def ema_copy(folder: Path) -> Run:
    model = get_peft_model(llama(), config())
    average = copy.deepcopy(model)

    def follow(model: nn.Module, step: int) -> None:
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)
            average(input_ids=torch.ones(1, 4, dtype=torch.long))

    return run(model, after_step=follow)


@case("method merge, generate, unmerge")
def merge_generate_unmerge(folder: Path) -> Run:
    def generate(model: nn.Module, step: int) -> None:
        with torch.no_grad():
            model.merge_adapter()
            model.generate(input_ids=torch.ones(1, 4, dtype=torch.long), max_new_tokens=2, do_sample=False)
            model.unmerge_adapter()

    return run(get_peft_model(llama(), config()), after_step=generate)


@case("method warm-up from a rate of zero")
def warm_up(folder: Path) -> Run:
    schedule: list[torch.optim.lr_scheduler.LambdaLR] = []

    def optimizer(model: nn.Module) -> Optimizer:
        made = adamw(model)
        schedule[:] = [torch.optim.lr_scheduler.LambdaLR(made, lambda step: min(1.0, step / 5))]
        return made

    return run(
        get_peft_model(llama(), config()), optimizer=optimizer, after_step=lambda model, step: schedule[0].step()
    )


@case("method checkpointing")
def checkpointing(folder: Path) -> Run:
    base = llama()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    return run(get_peft_model(base, config(lora_dropout=0.1)).train())


@case("method reentrant checkpointing", but="LP301")
def reentrant(folder: Path) -> Run:
    base = llama()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    base.enable_input_require_grads()
    return run(get_peft_model(base, config(lora_dropout=0.1)).train())


@case("method accumulation")
def accumulation(folder: Path) -> Run:
    def loss(model: nn.Module, ids: Tensor, step: int) -> Tensor:
        for part in ids.split(1)[:-1]:
            (tokens_loss(model, part, step) / 2).backward()
        return tokens_loss(model, ids[-1:], step) / 2

    return run(get_peft_model(llama(), config()), loss)


@case("method autocast")
def autocast(folder: Path) -> Run:
    def loss(model: nn.Module, ids: Tensor, step: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return tokens_loss(model, ids, step)

    return run(get_peft_model(llama(), config()), loss)


@case("method compiled", but="LP101 LP102 LP103 LP104 LP105 LP106 LP209 LP301")
def compiled(folder: Path) -> Run:
    model = get_peft_model(llama(), config())
    model.compile(backend="eager")
    return run(model)


def kinds() -> Iterator[tuple[str, Sequence[Case]]]:
    """The cases by the first word of their names."""
    for kind, cases in itertools.groupby(CASES, key=lambda case: case.name.split()[0]):
        yield kind, list(cases)
