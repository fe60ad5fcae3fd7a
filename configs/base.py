"""Every key that a config has, with defaults. The other files of this folder change what they need."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The default: RoBERTa-base on SST-2 from the hub at epsilon 8."""
    config = ConfigDict()
    config.name = "base"
    config.seed = 0  # of public randomness: a fresh classification head

    config.data = ConfigDict()
    config.data.task = "sst2"  # of GLUE; or "e2e", "dart", "jsonl" for text
    config.data.path = placeholder(str)  # folder with the data's own files; None: from the hub
    config.data.train_split = "train"  # "dev" where DART's train file is not to be had; of text alone
    config.data.cache_dir = "~/.cache/dp_rmt"  # of tokenised data
    config.data.max_length = 64  # tokens; longer texts are cut
    config.data.length_groups = (16, 32)  # shorter shapes that a batch is split into, beside max_length
    config.data.max_train_examples = placeholder(int)  # the first so many rows; None: all

    config.model = ConfigDict()
    config.model.path = "roberta-base"  # folder, hub name, or package:NAME/FOLDER of an installed package
    config.model.head = "classification"  # "infilling": prompt and label words; "causal_lm": a decoder, for text
    config.model.tuning = "full"  # "lora"; "ffa_lora": its factor B alone; "bias": biases alone
    config.model.trainable = ".*"  # regular expression over parameter paths; the rest is frozen (of "full" alone)
    config.model.lora = ConfigDict()
    config.model.lora.rank = 8
    config.model.lora.alpha = 16.0
    config.model.lora.targets = ("query", "value")
    config.model.dtype = "float32"  # of activations; parameters, norms and noise are float32 whatever it is
    config.model.remat = False  # recompute layers in the backward pass: less memory, more time

    config.privacy = ConfigDict()
    config.privacy.epsilon = 8.0  # inf: no noise, no clipping, no privacy
    config.privacy.delta = placeholder(float)  # None: N^-1.1
    config.privacy.l2_clip_norm = 0.1
    config.privacy.clip = "flat"  # or "automatic"
    config.privacy.accountant = "pld"  # or "rdp"
    config.privacy.expected_batch_size = 1000
    config.privacy.max_batch_size = placeholder(int)  # None: mean + 5 sd
    config.privacy.sampling_seed = placeholder(int)  # None: OS entropy, as private data needs
    config.privacy.noise_seed = placeholder(int)
    config.privacy.nonprivate_metrics = True  # also log nonprivate/... (raw values: keep the logs to yourself)

    config.denoise = ConfigDict()
    config.denoise.enabled = True
    config.denoise.method = "rmt"  # or what others do: "low_pass", "kalman", "truncate_rank"
    config.denoise.rank = 4  # of "truncate_rank"
    config.denoise.kalman_gain = 0.7  # of "kalman"
    # The others are of "rmt".
    config.denoise.target = "gradient"  # or "first_moment": Adam's, at its own noise level
    config.denoise.shrinker = "frobenius"
    config.denoise.gate = "kappa"  # or "tracy_widom"
    config.denoise.kappa = 1.0  # of "kappa": multiple of the bulk edge
    config.denoise.false_alarm = 0.01  # of "tracy_widom": probability that pure noise passes
    config.denoise.gate_per = "layer"
    config.denoise.rescale = "noisy_norm"
    config.denoise.below_edge = "drop"
    config.denoise.blend = "none"  # or "stein": noisy and denoised, by the least estimated error
    # "separate" matrices; "shared_inputs": query, key and value as one, gate and up too; "residual_stream": all that
    # reads it, of all layers, as one.
    config.denoise.structure = "separate"
    config.denoise.svd = "subspace"  # or "gram", "exact": all singular values, as shrinker="optshrink" needs

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or "muon": for the matrices, with Adam's size of steps
    config.optimizer.learning_rate = 5e-4
    config.optimizer.schedule = "linear"  # to zero over the run; or "constant"
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 0.0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.second_moment = "noisy"  # or "denoised"; with config.denoise.target="first_moment"
    config.optimizer.noise_correction = placeholder(float)  # floor of a second moment freed of noise (first_moment)

    config.train = ConfigDict()
    config.train.epochs = placeholder(float)  # either epochs or num_steps
    config.train.num_steps = placeholder(int)
    config.train.clipping_method = "auto"  # or "bookkeeping", "ghost"; "vmap" for layers without a rule
    config.train.microbatch_size = 32  # examples differentiated at once; 0: as many as fit into the memory
    config.train.eval_every = 20
    config.train.eval_batch_size = 128
    config.train.checkpoint_every = 50

    # How devices share the work (-1: what is left); not a part of the experiment, a run can go on with another mesh.
    config.mesh = ConfigDict()
    config.mesh.data = -1  # other examples, a copy of the parameters
    config.mesh.fsdp = 1  # other examples, a part of parameters and optimizer state
    config.mesh.tensor = 1  # the same examples, a part of each layer

    # What is kept; not a part of the experiment either.
    config.checkpoints = ConfigDict()
    config.checkpoints.keep = 2  # the newest
    config.checkpoints.keep_best = 0  # besides, those with the best score, where a checkpoint is also an evaluation
    config.checkpoints.score = placeholder(str)  # such as "eval/dev/accuracy"
    config.checkpoints.best_is = "max"  # or "min"

    # Once trained, a decoder writes a text for each row of a split, and is scored.
    config.generation = ConfigDict()
    config.generation.split = "test"  # or "dev"
    config.generation.max_prompts = placeholder(int)  # the first so many rows; None: all
    config.generation.method = "beam"  # or "greedy", "sampling"
    config.generation.max_new_tokens = 100
    config.generation.no_repeat_ngram_size = 0  # no so many tokens in a row come twice; 0: they may
    config.generation.num_beams = 5  # of "beam"
    config.generation.length_penalty = 1.0  # of "beam"
    config.generation.seed = 0  # of "sampling"
    config.generation.temperature = 1.0
    config.generation.top_k = 0
    config.generation.top_p = 1.0
    config.generation.batch_size = 32
    config.generation.prompt_lengths = (32, 64, 96, 128)  # tokens that prompts are padded to, beside the longest

    # Arms to compare: name -> the keys that differ, e.g. {"noisy": {"denoise": {"enabled": False}}}. Empty: one run.
    config.arms = ConfigDict()
    # The project's own text with a pre-trained small encoder (configs/quickstart.py); None: real data.
    config.synthetic = placeholder(ConfigDict)
    return config.lock()
