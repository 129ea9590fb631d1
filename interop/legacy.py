"""The project's former checkpoint format, format 1, which is read and no longer written."""

CONFIG_RENAMES = {
    "unlabelled": "unlabeled",
    "split": "labeled_list",
    "scale": "lsj_scale",
    "short_side": "short_sides",
    "colour": "color_jitter",
    "init": "init_from",
    "clip": "clip_grad_norm",
    "accumulate": "grad_accum_steps",
    "labels_only": "supervised_only",
    "max_overlap": "mask_nms_iou",
    "fine_masks": "full_res_masks",
    "teacher": "teacher_checkpoint",
    "student": "student_checkpoint",
    "refine": "finetune_steps",
}
MODEL_ARGS = ("hidden_dim", "encoder_layers", "encoder_ffn", "decoder_layers", "decoder_ffn")
OPTIONAL_MODEL_ARGS = ("pixel_mean", "pixel_std", "backbone_args")  # moved along only if they are not empty
DROPPED = ("mask_threshold", "pixel_weights", "score_power", "keep", "loader_timeout", "warmup")
DATA_ARGS = ("root", "train_json", "val_json", "image_folder")
PHASE_RENAMES = {"labels_only": "supervised", "refine": "finetune"}


def upgrade_checkpoint(checkpoint: dict) -> dict:
    """Convert a checkpoint of format 1 to format 2. The argument is not changed.

    What was trained is stored under "model" instead of "student". Phases and the keys of "config" have new
    names, and the arguments of the model are one dictionary, config["model_args"]. All else stays.
    Raises ValueError for another format."""
    if checkpoint.get("format") != 1:
        raise ValueError(f"cannot upgrade the checkpoint: its format is {checkpoint.get('format')!r}, not 1")
    upgraded = {("model" if key == "student" else key): value for key, value in checkpoint.items()}
    upgraded["format"] = 2
    if "phase" in checkpoint:
        upgraded["phase"] = PHASE_RENAMES.get(checkpoint["phase"], checkpoint["phase"])
    if "config" in checkpoint:
        upgraded["config"] = upgrade_config(checkpoint["config"])
    return upgraded


def upgrade_config(config: dict) -> dict:
    """Convert the "config" of a checkpoint of format 1 to the keys of format 2."""
    config = {key: value for key, value in config.items() if key not in DROPPED}
    model_args = {key: config.pop(key) for key in MODEL_ARGS if key in config}
    optional = {key: config.pop(key, None) for key in OPTIONAL_MODEL_ARGS}
    model_args |= {key: value for key, value in optional.items() if value}
    if "test_short_side" in config:
        short_side, long_side = config.pop("test_short_side"), config.pop("test_long_side")
        config["test_size"] = (short_side, long_side) if short_side else (0, 0)
    config = {CONFIG_RENAMES.get(key, key): value for key, value in config.items()}
    return current_options({**config, "model_args": model_args})


def current_options(config: dict) -> dict:
    """Convert the options of an earlier version: those that say how the data are read are in
    config["data_args"], strong_view is the changes of the view, pretrained may name a file, and some are
    gone."""
    given = {key: config[key] for key in DATA_ARGS if config.get(key)}
    config = {key: value for key, value in config.items() if key not in DATA_ARGS}
    if "strong_view" in config:
        strong_view = config["strong_view"]
        config["strong_view"] = {True: "color", False: ""}.get(strong_view, strong_view)
    if "pretrained" in config:
        pretrained = config["pretrained"]
        pretrained = {True: "true", False: "false"}.get(pretrained, pretrained)
        config["pretrained"] = config.get("backbone_weights") or pretrained
    gone = ("scale_to_batch", "mask_quality", "backbone_weights")
    config = {key: value for key, value in config.items() if key not in gone}
    return {**config, "data_args": {**given, **(config.get("data_args") or {})}}
