"""Fixtures of the tests of sampling."""

import pytest
import torch


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces and functionalizes blocks without compiling them: the compiler would take minutes."""

    def compile_block(block: torch.nn.Module, fullgraph: bool) -> None:
        compiled = torch.compile(block._call_impl, backend="aot_eager", fullgraph=fullgraph)
        block._compiled_call_impl = compiled

    monkeypatch.setattr(torch.nn.Module, "compile", compile_block)
