"""The schema of policy files for editors: ``policy.schema.json``, written by ``make schema``.

In a policy file, the first line then is::

    # yaml-language-server: $schema=PATH/policies/schema/policy.schema.json

Conditions and patterns are texts to it; ``runner policy check`` reads them.
"""

import json
from pathlib import Path

from policies.document import PolicyDocument

FILE = Path(__file__).parent / "policy.schema.json"


def text() -> str:
    """What FILE must say."""
    schema = PolicyDocument.model_json_schema(by_alias=True)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "runner's policies"}
    return json.dumps({**schema, **head}, indent=2) + "\n"
