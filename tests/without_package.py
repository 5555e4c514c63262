"""The start of a script that runs in a process of its own, as for a user who does not have the package."""

HIDE_PACKAGE = """
import sys

def hide_package():
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "distattn_hf":
                raise ModuleNotFoundError(name)

    assert "distattn_hf" not in sys.modules
    sys.meta_path.insert(0, Absent())

"""
