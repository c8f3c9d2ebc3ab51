"""Where numba's cache cannot be written, functions are compiled without it, and one line says so."""

from __future__ import annotations

import pytest

from pipeline import compiled


def test_without_a_cache_functions_are_compiled_and_one_line_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As with a HOME and an install folder that are read-only: numba then raises RuntimeError for cache=True."""
    monkeypatch.setattr(compiled, "_warned", False)
    for _ in range(2):
        namespace: dict[str, object] = {}
        # A function without a source file: numba finds no folder for its cache.
        exec(compile("def double(x):\n    return 2 * x\n", "<nowhere>", "exec"), namespace)
        assert compiled.njit("i8(i8)")(namespace["double"])(21) == 42
    assert capsys.readouterr().err.count("warning: numba's cache cannot be written") == 1


def test_other_errors_are_not_hidden():
    with pytest.raises(Exception, match="Failed in nopython mode pipeline"):
        compiled.njit("i8(i8)")(lambda x: x.no_such_attribute)
