# SPDX-License-Identifier: Apache-2.0
"""What must not be said: masked where files are written, found where it was written all the same."""

import ast
import base64
import html
import json
import os
import time
from pathlib import Path
from urllib.parse import quote

import nbformat
import pytest

from aiterlab import paths, provenance, security
from aiterlab.security import MASK, Leak, is_secret_name, scan_folder, scan_text, scrub, scrub_tree
from aiterlab.suite.notebook_parameters import MODELS

ROOT = Path(__file__).resolve().parents[1]
HOME = {"HOME": "/home/al"}
ODD = 'pa"ss<w>ö/r+d &1'
# Put together here, so that no scanner of this repository takes the tests for a leak.
TOKENS = {
    "Hugging Face token": "hf_" + "aB3dE" * 7,
    "GitHub token": "ghp_" + "aB3dE" * 8,
    "AWS access key": "AKIA" + "A1B2C3D4E5F6G7H8",
    "API key": "sk-" + "proj-aB3dE6gH9jK2mN5pQ8s",
    "Slack token": "xoxb-" + "123456789012-abcdefghij",
    "JSON web token": "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0In0.c2lnbmF0dXJlLXg",
    "Jupyter token": "token=" + "0123456789abcdef" * 3,
    "bearer token": "Authorization: Bearer " + "0123456789abcdefXYZ",
    "password in an address": "https://user:" + "hunter2@example.org/simple",
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEow+/=\nabc\n-----END RSA " + "PRIVATE KEY-----",
}
TOKENS_TOO = {
    "fine-grained": "github_pat_" + "11ABCDEFG0" * 3,
    "temporary": "ASIA" + "A1B2C3D4E5F6G7H8",
    "escaped": "-----BEGIN " + "PRIVATE KEY-----\\nMIIEow+/=\\n-----END " + "PRIVATE KEY-----",
    "without its end": "-----BEGIN EC " + "PRIVATE KEY-----\n" + "MHcCAQEEIIrYSSNQFaA2Hwf1duRSxKtLYX5CB04f\n",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/al/x.py", "~/x.py"),
        ("in /home/al.", "in ~."),
        ('File "/home/al/a", "/home/al/b"', 'File "~/a", "~/b"'),
        ("file:///home/al/a", "file://~/a"),
        ("\x1b[32m/home/al/x\x1b[0m", "\x1b[32m~/x\x1b[0m"),
        ("path:/home/al/vllm:/home/al", "path:~/vllm:~"),
        ("%2Fhome%2Fal%2Fx", "~%2Fx"),
        (r"\/home\/al\/x", r"~\/x"),
        ("/home/alice/x", "/home/alice/x"),
        ("/mnt/home/al/x", "/mnt/home/al/x"),
    ],
)
def test_scrub_shortens_the_home_directory_and_nothing_else(text, expected):
    assert scrub(text, HOME) == expected
    assert bool(scan_text(text, environment=HOME)) == (text != expected)


def test_scrub_with_the_root_folder_as_home_changes_nothing():
    assert scrub("/usr/bin and /", {"HOME": "/"}) == "/usr/bin and /"


def test_scrub_masks_long_values_of_secret_names_only():
    environment = {**HOME, "HF_TOKEN": "hf_long_value", "MY_KEY": "hf_long", "API_KEY": "short", "PLAIN": "plain_value"}
    environment["DB_PASSWORD"] = "hf_long_value_and_more"
    masked = scrub("hf_long_value hf_long_value_and_more hf_long short plain_value", environment)
    assert masked == f"{MASK} {MASK} hf_long short plain_value"


SECRETS = "HF_TOKEN JUPYTER_TOKEN OPENAI_API_KEY AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID PGPASSWORD DB_PASS MYSQL_PWD"
SECRETS += " GITHUB_PAT SENTRY_DSN SLACK_WEBHOOK_URL APIKEY API_KEYS SSH_KEY PASSPHRASE TOKEN_HF HF_TOKEN_VALUE"
SECRETS += " API_KEY_HF COOKIE PRIVATE_KEY_PEM DB-PASSWORD BASIC_AUTH OPENAI_KEY_2 DB_PASS_2 APP_KEYS SIGNING_KEYS"


@pytest.mark.parametrize("name", [*SECRETS.split(), "hfToken", "HFToken", "awsSecretKey", "dbPass"])
def test_names_of_secrets(name):
    assert is_secret_name(name) and (is_secret_name(name.lower()) or not name.isupper())


NO_SECRETS = "TOKENIZERS_PARALLELISM VLLM_MAX_TOKENS VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD PWD OLDPWD XAUTHORITY PATH"
NO_SECRETS += " GPG_AGENT_INFO NUM_TOKENS TOKEN_IDS EOS_TOKEN_ID TOKENIZER KEY_HEADS NUM_KEY_VALUE_HEADS KEYS KEYBOARD"
NO_SECRETS += " PASS_RATE PATTERN AUTHOR TOKEN_BUDGET TIME_PER_TOKEN_MS KEY_DIM KEY_DTYPE SORT_KEY FORWARD_PASS"


@pytest.mark.parametrize("name", NO_SECRETS.split())
def test_names_that_only_look_like_it(name):
    assert not is_secret_name(name) and not is_secret_name(name.lower())


def test_no_parameter_and_no_switch_of_the_suite_is_taken_for_a_secret():
    names = {name for model in MODELS.values() for name in model.model_fields}
    names |= {*provenance.ENVIRONMENT_PREFIXES, provenance.IMAGE_VARIABLE}
    names |= {value for name, value in vars(paths).items() if name.endswith("_VARIABLE")}
    assert {"draft_tokens", "output_tokens", "VLLM_", paths.CACHE_VARIABLE} <= names
    assert [name for name in sorted(names) if is_secret_name(name)] == []


def test_a_folder_is_no_secret_whatever_names_it(tmp_path):
    assert scrub(f"in {tmp_path}/x", HOME | {"HOST_PWD": str(tmp_path)}) == f"in {tmp_path}/x"


@pytest.mark.parametrize(
    "form",
    [
        str,
        json.dumps,
        lambda value: json.dumps(value, ensure_ascii=False),
        html.escape,
        lambda value: html.escape(value, quote=False),
        quote,
        lambda value: quote(value, safe=""),
        lambda value: base64.b64encode(value.encode()).decode(),
        lambda value: base64.b64encode(f"user:{value}".encode()).decode(),
        lambda value: base64.urlsafe_b64encode(f"x{value}yz".encode()).decode(),
    ],
    ids=["plain", "JSON", "JSON in UTF-8", "HTML", "HTML text", "address", "all of it", "base64", "basic", "url-safe"],
)
def test_a_secret_is_found_in_the_forms_in_which_files_escape_it(form):
    environment = HOME | {"SERVICE_PASSWORD": ODD}
    written = form(ODD)
    assert MASK in scrub(f"x {written} y", environment)
    assert scan_text(f"\n{written}", "log.txt", environment) == [Leak("log.txt", 2, "value of SERVICE_PASSWORD")]


@pytest.mark.parametrize(("kind", "token"), TOKENS.items(), ids=list(TOKENS))
def test_tokens_are_known_by_their_shape(kind, token):
    text = f"before {token} after"
    masked = scrub(text, HOME)
    assert masked.startswith("before ") and masked.endswith(" after") and MASK in masked
    assert [leak.kind for leak in scan_text(text, environment=HOME)] == [kind]
    assert scan_text(masked, environment=HOME) == [] and scrub(masked, HOME) == masked
    assert scrub(f"\x1b[31m{token}", HOME) != f"\x1b[31m{token}"


@pytest.mark.parametrize("token", TOKENS_TOO.values(), ids=list(TOKENS_TOO))
def test_other_forms_of_them(token):
    masked = scrub(f"{token} after", HOME)
    assert MASK in masked and "MIIE" not in masked and "MHcC" not in masked and masked.endswith(" after")


@pytest.mark.parametrize(
    "text",
    [
        "hf_model_name and the_hf_token_is_here",
        "risk-aBcDeFgHiJkLmNoPqRsTuV123",
        "class='sk-estimator-doc-link sk-toggleable__label-arrow'",
        "https://example.org:8080/a@b http://127.0.0.1:8000",
        "-----BEGIN CERTIFICATE-----",
        "a file that begins with -----BEGIN " + "PRIVATE KEY----- is a key",
        "bearer of bad news without any digits",
        "sha256:" + "0123456789abcdef" * 4,
        "token=abc tokens=12345678901234567890123456789012345",
    ],
)
def test_ordinary_text_stays_as_it_is(text):
    assert scrub(text, HOME) == text and scan_text(text, environment=HOME) == []


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    assert scrub("a\ud800b \U0001f600", HOME) == "a\ufffdb \U0001f600"


def test_scrub_tree_reaches_keys_and_nested_values(monkeypatch):
    monkeypatch.setenv("HOME", "/home/al")
    assert scrub_tree({"/home/al": [("/home/al/x", 1, None)]}) == {"~": [["~/x", 1, None]]}


def test_much_text_takes_seconds():
    line = "INFO worker.py:12 step 17 done in 0.123 s /home/al/x.py hf_model gh_ sk-learn ://x token=3 earer eyJ\n"
    began = time.process_time()
    scrub(line * (5 * 2**20 // len(line)), HOME)
    assert time.process_time() - began < 5  # 50 MB in under a minute, on a machine that is much slower than usual


@pytest.mark.parametrize(
    "piece", ["sk-", "://a", "-----BEGIN " + "PRIVATE KEY-----", "eyJaaaaaaaaaa.", "earer a", "gho_"]
)
def test_text_made_to_be_slow_is_not(piece):
    began = time.process_time()
    scrub(piece * (2**20 // len(piece)), HOME)
    assert time.process_time() - began < 10


def test_the_gate_reads_every_file_and_never_shows_what_it_found(tmp_path, monkeypatch):
    secret = "correct horse"
    monkeypatch.setenv("BATTERY_TOKEN", secret)
    monkeypatch.setenv("HOME", "/home/al")
    pixels = base64.b64encode(os.urandom(200_000)).decode()
    shown = nbformat.v4.new_output("display_data", data={"image/png": pixels[:90] + "/home/al/" + pixels})
    drawn = nbformat.v4.new_output("display_data", data={"image/svg+xml": f"<svg>\n<text>{secret}</text></svg>"})
    cell = nbformat.v4.new_code_cell("1", outputs=[shown, drawn])
    folder = tmp_path / "01_x"
    folder.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "executed.ipynb")
    (folder / "report.html").write_text(f"<p>\n{html.escape('/home/al')}</p><img src='data:image/png;base64,{pixels}'>")
    (folder / "log.txt").write_bytes(b"\xff\xfe\n\n" + secret.encode() + b"\n")
    (folder / "figure.png").write_bytes(b"\x89PNG\0tEXtPath\0/home/al/x\0" + secret.encode())
    (folder / "clean.json").write_text('{"a": "~/x"}')
    (folder / "link").symlink_to("/home/al/models")
    (folder / f"{secret}.txt").write_text("")
    leaks = scan_folder(tmp_path)
    assert {(leak.file, leak.line, leak.kind) for leak in leaks if leak.file != "01_x/executed.ipynb"} == {
        ("01_x/report.html", 2, "home directory"),
        ("01_x/log.txt", 3, "value of BATTERY_TOKEN"),
        ("01_x/figure.png", None, "home directory"),
        ("01_x/figure.png", None, "value of BATTERY_TOKEN"),
        ("01_x/link", None, "home directory, in where the link leads"),
        (f"01_x/{MASK}.txt", None, "value of BATTERY_TOKEN, in the file's name"),
    }
    assert [leak.kind for leak in leaks if leak.file == "01_x/executed.ipynb"] == ["value of BATTERY_TOKEN"]
    assert secret not in "".join(map(str, leaks))
    assert str(Leak("01_x/log.txt", 3, "home directory")) == "01_x/log.txt:3: home directory"


def test_a_leak_across_the_pieces_in_which_a_large_file_is_read_is_found_once_and_at_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(security, "_CHUNK_CHARACTERS", 1000)
    monkeypatch.setattr(security, "_LONGEST_LEAK", 100)
    (tmp_path / "log.txt").write_text("123456789\n" * 99 + "12345" + TOKENS["GitHub token"] + "\n" + "x\n" * 3000)
    assert scan_folder(tmp_path / "log.txt", HOME) == []  # the end of a longer word is no token
    (tmp_path / "log.txt").write_text("123456789\n" * 99 + "1234 " + TOKENS["GitHub token"] + "\n" + "x\n" * 3000)
    assert scan_folder(tmp_path / "log.txt", HOME) == [Leak("log.txt", 100, "GitHub token")]


def test_a_file_that_nobody_can_read_is_not_taken_for_clean(tmp_path, monkeypatch):
    (tmp_path / "log.txt").write_text("")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(security, "_scan_file", refuse)
    assert scan_folder(tmp_path, HOME) == [Leak("log.txt", None, "cannot be read (Permission denied)")]


def test_the_reference_results_leak_nothing():
    mine = {"HOME": os.environ.get("HOME", "/")}  # somebody's secret may be a word that stands there by chance
    assert scan_folder(ROOT / "results/reference", mine) == []


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load", "tempfile.mktemp"}
FORBIDDEN_CALLS |= {"subprocess.getoutput", "subprocess.getstatusoutput", "shutil.unpack_archive", "pd.read_pickle"}


def python_sources():
    """Every Python file of the project, and the code of its notebooks."""
    for path in sorted([ROOT / "run_all.py", *(ROOT / "lib").rglob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]):
        text = path.read_text()
        if path.suffix == ".ipynb":
            cells = nbformat.reads(text, 4).cells
            text = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        yield path.relative_to(ROOT).as_posix(), ast.parse(text)


def dangers(tree):
    """Yield what a source does that runs what it reads, lets anyone in, or asks a shell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {name}" for name in modules if name.partition(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name.endswith((".extractall", ".extract")):
                yield f"calls {name}"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else "?"
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and value is not False:
                    yield f"{name}({keyword.arg}={value})"
        elif isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "[::]"):
            yield f"the address {node.value}"
        elif isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            yield from ("trust_remote_code in a dictionary" for key in keys if key == "trust_remote_code")


def test_nothing_unpickles_trusts_remote_code_asks_a_shell_or_listens_to_the_network():
    found = {name: list(dangers(tree)) for name, tree in python_sources()}
    assert {name: said for name, said in found.items() if said} == {}
    assert len(found) > 100


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "subprocess.run(x, shell=True)",
        "LLM(m, trust_remote_code=True)",
        "np.load(f, allow_pickle=flag)",
        "serve(host='0.0.0.0')",
        "archive.extractall(folder)",
        "{'trust_remote_code': True}",
    ],
)
def test_the_check_finds(source):
    assert list(dangers(ast.parse(source)))
