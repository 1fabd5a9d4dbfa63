"""The schemas beside this file: what Kubernetes checks a RayJob and a RayService against, of KubeRay's release 1.7.0.

Made from a checkout of KubeRay's repository at the release's tag by

    python tests/crds/pack.py ray-operator/config/crd/bases

which takes the schema of version v1 from each custom resource definition and leaves out its descriptions.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


def without_descriptions(schema: Any) -> Any:
    """A schema less its prose; properties that are called description stay."""
    if isinstance(schema, list):
        return [without_descriptions(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for key, value in schema.items():
        if key == "properties":
            found[key] = {name: without_descriptions(one) for name, one in value.items()}
        elif key != "description":
            found[key] = without_descriptions(value)
    return found


def main(folder: Path) -> None:
    for plural in ("rayjobs", "rayservices"):
        definition = yaml.load((folder / f"ray.io_{plural}.yaml").read_text(), yaml.CSafeLoader)
        version = next(one for one in definition["spec"]["versions"] if one["name"] == "v1")
        schema = without_descriptions(version["schema"]["openAPIV3Schema"])
        text = json.dumps(schema, separators=(",", ":"), sort_keys=True)
        # No time in it: the same schema is the same file.
        (HERE / f"{definition['spec']['names']['kind']}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
