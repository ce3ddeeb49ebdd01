"""How the library of kernels is built, found, refused and forced."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bits import all_same, available

import deltaw
from deltaw.errors import ConfigError
from deltaw.quant import backends, native, nf4

CPU = torch.device("cpu")
ROOT = Path(deltaw.__file__).parents[1]
needs_library = pytest.mark.skipif(bool(native.unavailable(CPU)), reason=f"no kernels: {native.unavailable(CPU)}")


@pytest.fixture
def afresh(monkeypatch):
    """The library is looked for again, and again after the test."""
    native._library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native._library.cache_clear()


@needs_library
def test_the_environment_forces_an_instruction_set(afresh):
    afresh.setenv(native.VARIABLE, "generic")
    assert native.instruction_set() == "generic"
    native._library.cache_clear()
    afresh.setenv(native.VARIABLE, "avx521")
    with pytest.raises(ConfigError, match=r"DELTAW_NATIVE_ISA='avx521'.*did you mean 'avx512'"):
        native.unavailable(CPU)


@needs_library
def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ConfigError, match="no such instruction set"):
        native.select("sse")


@needs_library
def test_a_library_of_another_version_is_not_used(afresh):
    afresh.setattr(native, "_ABI", -1)
    assert "compiled for another version" in native.unavailable(CPU)
    with pytest.raises(ConfigError, match="another version"):
        native.quantize_4bit(torch.zeros(64), "nf4", 64)


def test_without_a_library_the_reference_runs_and_that_is_said_once(afresh, tmp_path, caplog):
    afresh.setattr(native, "__file__", str(tmp_path / "native.py"))  # where nothing was compiled
    afresh.delenv(backends.VARIABLE, raising=False)
    assert "no kernels were compiled" in native.unavailable(CPU)
    backends._chosen.cache_clear()
    try:
        assert [backends.backend_for(CPU) for _ in range(3)] == [nf4] * 3
        assert caplog.text.count("plain PyTorch") == 1
    finally:
        backends._chosen.cache_clear()
    (tmp_path / native._NAMES[0]).write_bytes(b"not a library")
    native._library.cache_clear()
    assert "cannot be loaded" in native.unavailable(CPU)


def test_it_is_for_cpus():
    assert native.unavailable(torch.device("cuda"))


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_thread_pool_beside_torch():
    """torch's OpenMP library serves both, and a call uses as many threads as torch is allowed."""
    code = """
import os, torch
from deltaw.quant import native
count = lambda: len(os.listdir('/proc/self/task'))
weight = torch.randn(1 << 20)
torch.set_num_threads(1)
before = count()
native.quantize_4bit(weight, 'nf4', 64)
alone = count() - before
torch.set_num_threads(3)
native.quantize_4bit(weight, 'nf4', 64)
maps = {line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'iomp' in line or 'libomp' in line}
print(native._loaded().dw_openmp(), alone, count() - before - alone, len(maps), *maps)
"""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # others may want the cores
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    openmp, alone, more, pools, *_ = done.stdout.split()
    assert (alone, pools) == ("0", "1"), done.stdout
    assert int(more) == (2 if openmp == "1" else 0), done.stdout


# --- the build ----------------------------------------------------------------------------------------------

needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake on this machine")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")


def build(folder: Path, *options: str, **environment: str) -> str:
    """What CMake said; the library is where it puts it."""
    said = ""
    for command in (["cmake", "-S", str(ROOT), "-B", str(folder), *options], ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
        said += done.stdout + done.stderr
        assert done.returncode == 0, said
    return said


@needs_cmake
def test_without_a_compiler_nothing_is_built_and_nothing_fails(tmp_path):
    assert "no working C compiler" in build(tmp_path, CC="/bin/false")
    assert not [path for path in tmp_path.rglob("*") if path.name in native._NAMES]


@pytest.mark.slow
@needs_cmake
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("scikit_build_core", "pathspec")), reason="no scikit-build-core"
)
@pytest.mark.parametrize("compiler", [True, False])
def test_the_package_installs_with_a_compiler_and_without(tmp_path, compiler):
    if compiler and shutil.which("cc") is None:
        pytest.skip("no C compiler on this machine")
    environment = os.environ if compiler else {**os.environ, "CC": "/bin/false"}
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        tmp_path,
        ROOT,
    ]
    done = subprocess.run(pip, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    there = {path.relative_to(tmp_path / "deltaw").as_posix() for path in (tmp_path / "deltaw").rglob("*.*")}
    assert {"py.typed", "report/page.html", "quant/native.py"} <= there
    assert any(f"quant/{name}" in there for name in native._NAMES) == compiler
    code = (
        "import torch, deltaw; from deltaw.quant import ops; ops.quantize_4bit(torch.ones(64)); print(deltaw.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    python = [sys.executable, "-c", code]  # its own folder would come first on its path
    done = subprocess.run(python, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.stdout.split()[:1] == [str(tmp_path / "deltaw" / "__init__.py")], done.stderr
    assert ("plain PyTorch" in done.stderr) != compiler


@pytest.mark.slow
@needs_cmake
@needs_compiler
def test_without_openmp_it_runs_on_one_thread(tmp_path, afresh):
    build(tmp_path, "-DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON")
    afresh.setattr(native, "__file__", str(tmp_path / "native.py"))
    weight = torch.randn(300, 1000)
    assert all_same(native.quantize_4bit(weight, "nf4", 64), nf4.quantize_4bit(weight, "nf4", 64))
    assert native._loaded().dw_openmp() == 0


@pytest.mark.slow
@needs_cmake
@needs_compiler
@needs_library
def test_the_sanitizers_find_nothing(tmp_path):
    """What `make sanitize` runs."""
    build(tmp_path, "-DDELTAW_SANITIZE=ON")
    done = subprocess.run([tmp_path / "check_kernels"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == available()[::-1]
