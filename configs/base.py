"""Every key that a config has, with defaults. The other files of this folder change what they need."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The default: RoBERTa-base on SST-2 from the hub at epsilon 8."""
    config = ConfigDict()
    config.name = "base"
    config.seed = 0  # of public randomness: a fresh classification head
    config.data = _data()
    config.model = _model()
    config.privacy = _privacy()
    config.denoise = _denoise()
    config.optimizer = _optimizer()
    config.train = _train()
    config.mesh = _mesh()
    config.checkpoints = _checkpoints()
    config.generation = _generation()
    # Arms to compare: name -> the keys that differ, e.g. {"noisy": {"denoise": {"enabled": False}}}. Empty: one run.
    config.arms = ConfigDict()
    # The project's own text with a pre-trained small encoder (configs/quickstart.py); None: real data.
    config.synthetic = placeholder(ConfigDict)
    return config.lock()


def _data() -> ConfigDict:
    data = ConfigDict()
    data.task = "sst2"  # of GLUE; "e2e", "dart", "jsonl": text from a source; "customersim", "documents": text as it is
    data.path = placeholder(str)  # folder with the data's own files; None: from the hub
    data.train_split = "train"  # "dev" where DART's train file is not to be had; of text alone
    data.cache_dir = "~/.cache/dp_rmt"  # of tokenised data
    data.max_length = 64  # tokens; longer texts are cut
    data.length_groups = (16, 32)  # shorter shapes that a batch is split into, beside max_length
    data.max_train_examples = placeholder(int)  # the first so many rows; None: all
    data.skip_lines = 0  # the first so many lines of each dialogue of "customersim"
    data.max_eval_documents = placeholder(int)  # of each evaluation split; None: all
    # What is sensitive in documents: any of "attributes" (CustomerSim's database), "spans" (files), "numbers", "codes",
    # "emails", "dates", "presidio".
    data.sensitive = ()
    return data


def _model() -> ConfigDict:
    model = ConfigDict()
    model.path = "roberta-base"  # folder, hub name, or package:NAME/FOLDER of an installed package
    model.head = "classification"  # "infilling": prompt and label words; "causal_lm": a decoder, for text
    model.tuning = "full"  # "lora"; "ffa_lora": its factor B alone; "bias": biases alone
    model.trainable = ".*"  # regular expression over parameter paths; the rest is frozen (of "full" alone)
    model.lora = ConfigDict()
    model.lora.rank = 8
    model.lora.alpha = 16.0
    model.lora.targets = ("query", "value")
    model.dtype = "float32"  # of activations; parameters, norms and noise are float32 whatever it is
    model.remat = False  # recompute layers in the backward pass: less memory, more time
    model.flash_attention = False  # decoders on NVIDIA GPUs, with dtype "bfloat16"
    return model


def _privacy() -> ConfigDict:
    privacy = ConfigDict()
    privacy.epsilon = 8.0  # inf: no noise, no clipping, no privacy
    privacy.delta = placeholder(float)  # None: N^-1.1
    privacy.l2_clip_norm = 0.1
    privacy.clip = "flat"  # or "automatic"
    privacy.accountant = "pld"  # or "rdp"
    privacy.expected_batch_size = 1000
    privacy.max_batch_size = placeholder(int)  # None: mean + 5 sd
    privacy.sampling_seed = placeholder(int)  # None: OS entropy, as private data needs
    privacy.noise_seed = placeholder(int)
    privacy.nonprivate_metrics = True  # also log nonprivate/... (raw values: keep the logs to yourself)
    return privacy


def _denoise() -> ConfigDict:
    denoise = ConfigDict()
    denoise.enabled = True
    denoise.method = "rmt"  # or what others do: "low_pass", "kalman", "truncate_rank"
    denoise.rank = 4  # of "truncate_rank"
    denoise.kalman_gain = 0.7  # of "kalman"
    # The others are of "rmt".
    denoise.target = "gradient"  # or "first_moment": Adam's, at its own noise level
    denoise.shrinker = "frobenius"
    denoise.gate = "kappa"  # or "tracy_widom"
    denoise.kappa = 1.0  # of "kappa": multiple of the bulk edge
    denoise.false_alarm = 0.01  # of "tracy_widom": probability that pure noise passes
    denoise.gate_per = "layer"
    denoise.rescale = "noisy_norm"
    denoise.below_edge = "drop"
    denoise.blend = "none"  # or "stein": noisy and denoised, by the least estimated error
    # "separate" matrices; "shared_inputs": query, key and value as one, gate and up too; "residual_stream": all that
    # reads it, of all layers, as one.
    denoise.structure = "separate"
    denoise.svd = "subspace"  # or "gram", "exact": all singular values, as shrinker="optshrink" needs
    return denoise


def _optimizer() -> ConfigDict:
    optimizer = ConfigDict()
    optimizer.name = "adamw"  # or "muon": for the matrices, with Adam's size of steps
    optimizer.learning_rate = 5e-4
    optimizer.schedule = "linear"  # to zero over the run; or "constant"
    optimizer.warmup_steps = 0
    optimizer.weight_decay = 0.0
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.second_moment = "noisy"  # or "denoised"; with config.denoise.target="first_moment"
    optimizer.noise_correction = placeholder(float)  # floor of a second moment freed of noise (first_moment)
    return optimizer


def _train() -> ConfigDict:
    train = ConfigDict()
    train.epochs = placeholder(float)  # either epochs or num_steps
    train.num_steps = placeholder(int)
    train.clipping_method = "auto"  # or "bookkeeping", "ghost"; "vmap" for layers without a rule
    train.microbatch_size = 32  # examples differentiated at once; 0: as many as fit into the memory
    train.eval_every = 20
    train.eval_batch_size = 128
    train.checkpoint_every = 50
    return train


def _mesh() -> ConfigDict:
    """How devices share the work (-1: what is left); not of the experiment: a run can go on with another mesh."""
    mesh = ConfigDict()
    mesh.data = -1  # other examples, a copy of the parameters
    mesh.fsdp = 1  # other examples, a part of parameters and optimizer state
    mesh.tensor = 1  # the same examples, a part of each layer
    return mesh


def _checkpoints() -> ConfigDict:
    """What is kept; not a part of the experiment either."""
    checkpoints = ConfigDict()
    checkpoints.keep = 2  # the newest
    checkpoints.keep_best = 0  # besides, those with the best score, where a checkpoint is also an evaluation
    checkpoints.score = placeholder(str)  # such as "eval/dev/accuracy"
    checkpoints.best_is = "max"  # or "min"
    return checkpoints


def _generation() -> ConfigDict:
    """Once trained, a decoder writes a text for each row of a split, and is scored."""
    generation = ConfigDict()
    generation.split = "test"  # or "dev"
    generation.max_prompts = placeholder(int)  # at most so many rows, evenly spaced; None: all
    generation.method = "beam"  # or "greedy", "sampling"
    generation.max_new_tokens = 100
    generation.no_repeat_ngram_size = 0  # no so many tokens in a row come twice; 0: they may
    generation.num_beams = 5  # of "beam"
    generation.length_penalty = 1.0  # of "beam"
    generation.seed = 0  # of "sampling"
    generation.temperature = 1.0
    generation.top_k = 0
    generation.top_p = 1.0
    generation.batch_size = 32
    generation.prompt_lengths = (32, 64, 96, 128)  # tokens that prompts are padded to, beside the longest
    return generation
