"""Shapes and types in the signatures of archs and restore are enforced while the suite runs."""

from jaxtyping import install_import_hook

install_import_hook(["archs", "restore"], "typecheck.check")
