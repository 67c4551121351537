"""transformers.js in Node: transformers_js.mjs, copied to where its packages are."""

import json
import shutil
import subprocess
from pathlib import Path

from scored import rows

ENVIRONMENTS = {"transformers.js": ["numpy", "npm:@huggingface/transformers"]}


def scores(folder, images):
    script = shutil.copy(Path(__file__).with_name("transformers_js.mjs"), "../transformers_js.mjs")
    printed = subprocess.run(["node", script, folder.parent, folder.name, *images], check=True, stdout=subprocess.PIPE).stdout
    return rows(folder, [json.loads(line)["scores"] for line in printed.splitlines()])
