"""Puts configs/ into the package when a wheel is built; everything else is in pyproject.toml.

The folder stays where people look for it, in the checkout, and is not copied there.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithConfigs(build_py):
    """Copies configs/*.yaml to fedtalos/configs/ of what is built."""

    def run(self) -> None:
        """Build as ever, then copy; an editable install reads the checkout's own."""
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib, "fedtalos", "configs")
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(__file__).parent.joinpath("configs").glob("*.yaml")):
            self.copy_file(str(path), str(folder / path.name))


setup(cmdclass={"build_py": WithConfigs})
