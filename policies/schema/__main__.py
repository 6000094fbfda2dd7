"""``python -m policies.schema``: writes the schema of policy files."""

from policies.schema import FILE, text

FILE.write_text(text(), encoding="utf-8")
