"""What an index would get: source distribution and wheel have all files, and their page no link that leads nowhere."""

import email
import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import mtlbalance
from tests.pages import README, ROOT, blocks_of, links_of

sys.path.append(str(ROOT / "docs" / "_ext"))
import index_page

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = (ROOT / "CITATION.cff").read_text()
SOMEWHERE = "https://somewhere.example/mtlbalance"
PACKAGE = pathlib.Path(mtlbalance.__file__).parent


def build(kind, source, folder):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", folder], cwd=source, check=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sources")
    build("sdist", ROOT, folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"mtlbalance-{mtlbalance.__version__}"


@pytest.fixture(scope="module")
def wheel(sources):
    """The one that is built of the source distribution, as pip does where it finds no wheel."""
    build("wheel", sources, sources.parent)
    return zipfile.ZipFile(next(sources.parent.glob("*.whl")))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git for the files, of which there are none here")
def test_the_source_distribution_has_every_file(sources):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [name for name in tracked.stdout.splitlines() if not (sources / name).exists()] == []


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    files = {str(path.relative_to(PACKAGE.parent)) for path in PACKAGE.rglob("*") if path.is_file()}
    installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert installed == {name for name in files if "__pycache__" not in name}
    assert "mtlbalance/py.typed" in installed


def test_what_an_index_reads(wheel):
    found = email.message_from_bytes(wheel.read(f"mtlbalance-{mtlbalance.__version__}.dist-info/METADATA"))
    assert found["Version"] == mtlbalance.__version__
    assert found["Author"] == PROJECT["authors"][0]["name"]
    assert found["Description-Content-Type"] == "text/markdown"
    page = index_page.index_page(README, PROJECT["urls"].get("Repository"))
    assert found.get_payload(decode=True).decode().strip() == page.strip()


def test_without_an_address_nothing_relative_is_left():
    page = index_page.index_page(README)
    assert [link for link in links_of(page) if not link.startswith("https://")] == []
    assert "a picture in the source distribution" in page
    assert [*blocks_of("", page)] == [*blocks_of("", README)]


def test_with_an_address_every_link_leads_to_its_file():
    links = links_of(index_page.index_page(README, f"{SOMEWHERE}/"))
    ours = [re.fullmatch(rf"{SOMEWHERE}/(blob|raw)/HEAD/(.*)", link) for link in links if SOMEWHERE in link]
    assert [found[2] for found in ours] == [link for link in links_of(README) if not link.startswith("https://")]
    assert all((found[1] == "raw") == found[2].endswith(".png") for found in ours)
    assert all(link.startswith("https://") for link in links)


def test_the_address_is_read_from_the_project():
    project = {"urls": {"Repository": SOMEWHERE}}
    index_page.IndexPage(str(ROOT), {}).update(project)
    assert project["readme"]["text"] == index_page.index_page(README, SOMEWHERE)


@pytest.mark.parametrize("address", [None, SOMEWHERE])
def test_code_and_links_that_lead_somewhere_stay(address):
    text = 'See [it](https://a.example), [above](#why).\n\n```python\nx = {"a": f}["a"](y), "[b](c)"\n```\n'
    assert index_page.index_page(text, address) == text


def test_one_version_and_one_address():
    """The changelog's newest, and what CITATION.cff has by hand."""
    version, date = re.search(r"^## (\d\S*) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    cited = dict(re.findall(r"^([\w-]+): (.*)$", CITATION, re.MULTILINE))
    assert version == cited["version"] == mtlbalance.__version__
    assert date == cited["date-released"]
    assert cited.get("repository-code") == PROJECT["urls"].get("Repository")
    assert f"- name: {PROJECT['authors'][0]['name']}" in CITATION
    assert cited["license"] == PROJECT["license"]
