"""Commands that load and serve what was written name files that are there, and say what is known of each server."""

from pathlib import Path

from prunelit.export.load_commands import list_load_commands, list_serve_commands
from prunelit.runtime.text_files import write_json


def test_a_gguf_file_inside_a_folder_is_named() -> None:
    for path, file in ((Path("out"), "out/model.gguf"), (Path("out/own.gguf"), "out/own.gguf")):
        commands = [text for _, text in list_load_commands("gguf", path, plan=None)]
        assert len(commands) == 3 and all(file in text for text in commands)


def test_vllm_is_named_where_it_runs_the_folder() -> None:
    def headings(name: str, model_type: str) -> list[str]:
        return [heading for heading, _ in list_serve_commands(name, "out", model_type, plan=None)]

    assert headings("hetero", "pruned_llama") == ["With vLLM (tried with 0.32.0)"]
    assert headings("hetero", "pruned_gemma3") == []  # multimodal
    assert headings("padded", "llama") == ["With vLLM (tried with 0.32.0)"]
    assert headings("padded", "opt") == ["With vLLM (not tried with this family)"]


def test_4_bits_for_vllm_are_served_by_it(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    found = dict(list_load_commands("w4a16", tmp_path, plan=None))
    (command,) = (command for heading, command in found.items() if heading.startswith("With vLLM"))
    assert command == f"vllm serve {tmp_path}" and "With prunelit" in found
    write_json(tmp_path / "config.json", {"model_type": "pruned_llama", "auto_map": {}})
    found = dict(list_load_commands("w4a16", tmp_path, plan=None))
    assert f"vllm serve {tmp_path} --trust-remote-code" in found.values()
