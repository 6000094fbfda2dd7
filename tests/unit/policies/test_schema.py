"""The schema that editors use is that of this version."""

import json

from policies import schema
from policies.document import PolicyDocument


def test_the_schema_in_the_tree_is_current() -> None:
    assert schema.FILE.read_text() == schema.text(), "make schema"


def test_the_schema_has_every_section_by_its_name_in_files() -> None:
    names = {field.alias or name for name, field in PolicyDocument.model_fields.items()}
    found = json.loads(schema.text())
    assert found["properties"].keys() == names
    assert found["additionalProperties"] is False
    assert found["$defs"]["Terms"]["properties"]["isolation"]["anyOf"][0]["enum"] == [
        "container", "gvisor", "kata",
    ]  # fmt: skip
