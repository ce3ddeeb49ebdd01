"""The names that users import, and what importing costs."""

import subprocess
import sys

import pytest

import deltaw

#: what `import deltaw` and its library part must do without
ABSENT = [
    "peft",
    "trl",
    "bitsandbytes",
    "datasets",
    "matplotlib",
    "rich",
    "typer",
    "pydantic",
    "yaml",
    "gguf",
]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_all_is_whole():
    assert len(deltaw.__all__) == len(set(deltaw.__all__))
    assert set(deltaw._PUBLIC) | {"__version__"} == set(deltaw.__all__) == set(dir(deltaw))


@pytest.mark.parametrize("name", deltaw.__all__)
def test_each_name_is_there_and_is_what_its_module_exports(name):
    value = getattr(deltaw, name)
    if name in deltaw._PUBLIC:
        module = sys.modules[deltaw._PUBLIC[name]]
        assert name in module.__all__
        assert getattr(module, name) is value


def test_the_names_for_type_checkers_are_the_same():
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(deltaw))
    block = next(n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))
    named = {alias.name: str(n.module) for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert named == deltaw._PUBLIC


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'LoraConfg'"):
        _ = deltaw.LoraConfg
    with pytest.raises(ImportError):
        from deltaw import nothing  # noqa: F401


def test_the_import_itself_loads_nothing():
    assert run("import sys, deltaw; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])") == "[]"


def test_the_library_works_with_core_packages_alone():
    """Adapters, files and merging, with every optional package made unimportable."""
    out = run(f"""
import sys, tempfile
for name in {ABSENT}:
    sys.modules[name] = None  # importing it raises ImportError
import torch, deltaw
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
model = deltaw.get_peft_model(net, deltaw.LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False))
model.print_trainable_parameters()
x = torch.randn(5, 4)
model(x).sum().backward()
with tempfile.TemporaryDirectory() as folder, model.disable_adapter():
    model.save_pretrained(folder)
merged = model.merge_and_unload()
loaded = [m for m in {ABSENT} if sys.modules.get(m)]
print(loaded, type(merged[0]).__name__)
""")
    assert out.splitlines()[-1] == "[] Linear"
