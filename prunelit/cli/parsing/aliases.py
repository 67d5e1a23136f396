"""Other spellings of options: what peers call them, dashes for underscores; and what is refused by name.

They are translated before a parser sees the command line, so help pages and config files know one name for each thing.
"""

from collections.abc import Mapping

from prunelit.runtime.errors import BadOption

ALIASES: Mapping[str, tuple[str, ...]] = {
    "ratio": ("sparsity", "pruning_ratio", "sparsity_ratio"),
    "method": ("prune_method", "pruning_method"),
    "model": ("pretrained", "model_name_or_path", "model_id", "base_model"),
    "text": ("dataset", "calibration_data", "calibration_dataset"),
    "windows": ("num_samples", "nsamples", "num_calibration_samples"),
    "seqlen": ("max_seq_length", "max_seq_len", "max_length"),
    "seed": ("random_seed",),
    "out": ("output_dir", "save_dir", "output", "output_path"),
    "overwrite": ("overwrite_output_dir",),
    "dtype": ("torch_dtype",),
}
"""{our name: what others call it}."""
OWN_NAMES: Mapping[str, Mapping[str, str]] = {
    "compare": {
        "ratio": "ratios",
        "method": "methods",
        "seed": "seeds",
        "text": "calibration.text",
        "windows": "calibration.windows",
        "seqlen": "calibration.seqlen",
    },
    "fit": {
        "text": "data.train",
        "windows": "data.calibration_windows",
        "seqlen": "data.seqlen",
        "seed": "seed_everything",
        "out": "trainer.default_root_dir",
    },
}
"""Where a command has several of a thing, or parts with options of their own: {our name: that command's}."""
REFUSED: Mapping[str, str] = {
    "trust_remote_code": (
        "expected a model of a family that transformers has; code that comes with a model is never run here, since it "
        "could do anything on this machine"
    ),
    "revision": (
        "expected a folder, because a hub id is read at its newest revision: hf download ID --revision REVISION "
        "--local-dir DIR, then --model DIR"
    ),
}
"""Options that others have and prunelit refuses, with the reason."""
_OF_A_METHOD = ("ratio", "method")
"""Options that `fit` has once for every callback."""
_OWN_OPTIONS_OF_FIT: Mapping[str, tuple[str, ...]] = {"fit": (), "validate": (), "plan of fit": ("out",)}
"""{command with the options of `fit`: those of this list that it has itself}."""


def translate_options(command: str, arguments: list[str]) -> list[str]:
    """Translate other spellings on a command line to the names that the command's parser knows.

    `fit --model` is left to `prunelit.cli.parsing.fit_options`: it may also hold the options of a model.

    Args:
        command: its name; "plan of fit" for `plan` with a config of `fit`.
        arguments: command line after the command.

    Raises:
        BadOption: an option that is refused, with the reason, or one of a method, which is a callback in `fit`.

    Example:
        >>> translate_options("prune", ["--sparsity", "0.2", "--max-shard-size=2GB", "--out", "a-b"])
        ['--ratio', '0.2', '--max_shard_size=2GB', '--out', 'a-b']
        >>> translate_options("fit", ["--output-dir", "runs/a"])
        ['--trainer.default_root_dir', 'runs/a']
    """
    has_options_of_fit = command in _OWN_OPTIONS_OF_FIT
    own_names = {**OWN_NAMES.get("fit" if has_options_of_fit else command, {})}
    for name in _OWN_OPTIONS_OF_FIT.get(command, ()):
        del own_names[name]
    translated = []
    for argument in arguments:
        written, equals, value = argument.partition("=")
        if written.startswith("--") and len(written) > 2:
            append = "+" if written.endswith("+") else ""
            name = written[2:].rstrip("+").replace("-", "_")
            if name in REFUSED:
                raise BadOption(f"{command}: --{written[2:]}: {REFUSED[name]}")
            name = name_alias(name) or name
            if name in _OF_A_METHOD and has_options_of_fit:
                raise BadOption(
                    f"{command.partition(' ')[0]}: --{written[2:]}: expected the method as a callback: "
                    "--trainer.callbacks+ prunelit.callbacks.LLMBIP --trainer.callbacks.ratio 0.2"
                )
            argument = f"--{own_names.get(name, name)}{append}{equals}{value}"
        translated.append(argument)
    return translated


def name_alias(name: str) -> str | None:
    """Name the option that others call by this name; None where it is no alias.

    Args:
        name: an option without dashes.

    Example:
        >>> name_alias("nsamples"), name_alias("windows")
        ('windows', None)
    """
    return next((ours for ours, others in ALIASES.items() if name in others), None)


def render_alias_table() -> str:
    """Write the table of aliases for the documentation, as Markdown.

    Example:
        >>> render_alias_table().splitlines()[2]
        '| `--ratio` | `--sparsity`, `--pruning_ratio`, `--sparsity_ratio` | `compare --ratios` |'
    """
    rows = ["| option | also written | in commands that have several |", "|---|---|---|"]
    for name, others in ALIASES.items():
        places = [f"`{command} --{own[name]}`" for command, own in OWN_NAMES.items() if name in own]
        rows.append(f"| `--{name}` | {', '.join(f'`--{other}`' for other in others)} | {', '.join(places)} |")
    rows += [f"| refused | `--{name}` | {reason} |" for name, reason in REFUSED.items()]
    return "\n".join(rows)
