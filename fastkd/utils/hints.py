"""What a mistyped name may mean, and what names of other trainers are called here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What users of timm, DeiT, torchvision and Hugging Face's Trainer write, by the name it has here.
_CALLED_HERE = {
    "accumulation": "gradient_accumulation_steps grad_accum_steps accumulate_grad_batches "
    "update_freq accum_iter",
    "adam_eps": "opt_eps adam_epsilon eps epsilon",
    "alpha": "distillation_alpha kd_alpha distill_loss_weight kd_weight kd_ratio",
    "amp": "native_amp apex_amp fp16 bf16 mixed_precision precision amp_dtype use_amp",
    "augment": "no_aug",
    "auto_augment": "aa autoaugment rand_augment randaugment ra_magnitude",
    "batch_size": "per_device_train_batch_size per_gpu_train_batch_size train_batch_size bs b",
    "best": "eval_metric metric_for_best_model",
    "ce_weight": "task_loss_weight",
    "checkpoint": "initial_checkpoint checkpoint_path resume_from",
    "checkpoint_interval": "recovery_interval save_steps save_freq save_interval",
    "clip_grad": "max_grad_norm gradient_clip_val grad_clip clip_grad_norm max_norm",
    "color_jitter": "color_jitter_strength jitter",
    "compile": "torchcompile torch_compile",
    "crop_mode": "eval_crop_mode",
    "cutmix": "cutmix_alpha",
    "data": "data_dir data_path dataset dataset_name train_dir train_data",
    "data_root": "dataset_root cache_dir data_cache_dir",
    "drop_path": "drop_path_rate drop_connect drop_connect_rate stochastic_depth "
    "stochastic_depth_rate",
    "ema_decay": "model_ema model_ema_decay ema use_ema no_ema ema_momentum",
    "ema_warmup": "model_ema_warmup",
    "epochs": "num_train_epochs num_epochs max_epochs n_epochs",
    "eval_batch_size": "validation_batch_size per_device_eval_batch_size "
    "per_gpu_eval_batch_size val_batch_size vb",
    "eval_interval": "val_interval eval_freq check_val_every_n_epoch",
    "feature_loss": "kd_feature_loss feature_distillation",
    "feature_weight": "feature_alpha feat_weight beta feat_loss_weight hint_weight",
    "hflip": "flip horizontal_flip random_flip",
    "img_size": "input_size image_size size resolution train_crop_size val_crop_size crop_size",
    "interpolation": "train_interpolation",
    "keep_checkpoints": "checkpoint_hist save_total_limit",
    "label_smoothing": "smoothing label_smoothing_factor",
    "log_interval": "logging_steps log_every print_freq log_every_n_steps",
    "logit_loss": "distillation_type distill_type kd_loss kd_loss_type kd_distill_type",
    "lr": "learning_rate base_lr lr_base blr peak_lr max_lr",
    "lr_scaling": "lr_base_size lr_base_scale scale_lr auto_lr_scale",
    "max_nonfinite": "max_nan_steps",
    "min_lr": "eta_min lr_min end_lr",
    "mixup": "mixup_alpha",
    "mixup_switch_prob": "switch_prob",
    "model": "arch architecture model_name model_name_or_path student student_model backbone",
    "num_classes": "nb_classes num_labels n_classes",
    "opt": "optim optimizer",
    "opt_kwargs": "opt_betas adam_beta1 adam_beta2 betas momentum nesterov opt_args",
    "output": "output_dir out_dir save_dir log_dir logdir work_dir experiment default_root_dir",
    "pairs": "feature_layers distill_layers hint_layers layer_pairs kd_layers",
    "recipe": "config config_file cfg",
    "reprob": "random_erase random_erasing erasing_prob re_prob",
    "repeated_aug": "aug_repeats repeats ra_reps num_aug_repeats repeated_augmentation",
    "resume": "resume_from_checkpoint auto_resume ckpt_path no_resume_opt",
    "scale": "random_crop_scale crop_scale",
    "sched": "lr_scheduler lr_scheduler_type scheduler lr_schedule",
    "sched_kwargs": "decay_epochs decay_rate decay_milestones cooldown_epochs patience_epochs "
    "lr_cycle_mul lr_cycle_decay lr_cycle_limit lr_k_decay lr_step_size lr_gamma warmup_prefix",
    "seed": "random_seed manual_seed data_seed",
    "tau": "temperature kd_temperature distillation_tau distillation_temperature t temp",
    "teacher": "teacher_model teacher_name kd_model_name kd_model teacher_arch",
    "teacher_checkpoint": "teacher_path teacher_weights kd_model_path teacher_pretrained",
    "teacher_img_size": "teacher_input_size teacher_size",
    "top": "topk top_k",
    "track": "log_wandb report_to wandb tensorboard use_wandb",
    "train_samples": "train_num_samples epoch_size max_train_samples",
    "warmup_epochs": "warmup warmup_steps warmup_ratio lr_warmup_epochs num_warmup_steps",
    "warmup_lr": "lr_warmup_init warmup_lr_init lr_warmup_decay warmup_init_lr",
    "weight_decay": "wd",
    "weights": "use_ema model_weights",
    "workers": "num_workers dataloader_num_workers j n_workers",
}
# What a value means here that may mean something else elsewhere.
_NOTES = {
    "amp": "none, bf16 or fp16",
    "augment": "none",
    "batch_size": "images of an update over all ranks",
    "ema_decay": "none switches it off",
    "lr_scaling": "true multiplies lr by batch_size / 512",
    "opt_kwargs": "as name=value,...",
    "output": "an argument beside the recipe",
    "recipe": "an argument beside its fields",
    "resume": "an argument beside the recipe",
    "sched_kwargs": "as name=value,...",
    "track": "tensorboard, wandb or both",
    "warmup_epochs": "in epochs",
}
_WEIGHTS = "a student starts from weights if model is a checkpoint, a run, local-dir: or hf_hub:"
# What has no name here, and why.
_ABSENT = {
    "finetune": _WEIGHTS,
    "pretrained": _WEIGHTS,
    "pretrained_path": _WEIGHTS,
    "bce_loss": "the student's loss on labels is cross-entropy",
    "dist_backend": "torchrun decides it",
    "drop": "dropout is of the model: create it, and hand it over as the student",
    "layer_decay": "there is no decay of the learning rate by layer",
    "llrd": "there is no decay of the learning rate by layer",
    "local_rank": "torchrun sets it in the environment",
    "max_steps": "a run's length is given in epochs",
    "steps": "a run's length is given in epochs",
    "model_kwargs": "create the model, and hand it over as the student",
    "sync_bn": "batch norms are not synchronized",
    "vflip": "images are never flipped upside down",
}
_WORDS = {name: frozenset(words.split()) for name, words in _CALLED_HERE.items()}


def suggestion(word: str, known: Iterable[str]) -> str:
    """``(did you mean ...?)``, or what the word is called here, after a space; may be empty.

    Dashes and underscores are the same; flags are flags (``--lr``) in ``known`` too.
    """
    names = {_plain(name): name for name in known}
    given = _plain(word)
    if given not in names:
        here = [name for name, words in _WORDS.items() if given in words and name in names]
        if here:
            note = f"; {_NOTES[here[0]]}" if here[0] in _NOTES else ""
            return f" (here it is {_quoted(names[here[0]])}{note})"
        if given in _ABSENT and "model" in names:
            return f" ({_ABSENT[given]})"
    if (positive := names.get(given.removeprefix("no_"))) and given.startswith("no_"):
        return f" (it is switched off by a value: {_quoted(positive)} false, none or 0)"
    close = [given] if given in names else difflib.get_close_matches(given, names, n=1)
    return f" (did you mean {_quoted(names[close[0]])}?)" if close else ""


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def _quoted(name: str) -> str:
    return name if name.startswith("-") else repr(name)
