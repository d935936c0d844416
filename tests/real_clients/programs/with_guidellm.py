"""guidellm: one short run; the second argument is the folder of the model's tokenizer, the third one for results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

url, tokenizer, folder = sys.argv[1:]
results = Path(folder) / "results.json"
options = {
    "--backend": f"kind=openai_http,target={url},model=smollm2",
    "--profile": "kind=concurrent,streams=2",
    "--constraint": "kind=max_requests,count=4",
    "--tokenizer": f"kind=huggingface_auto,model={tokenizer}",
    "--data": "kind=synthetic_text,prompt_tokens=24,output_tokens=8",
    "--output": f"kind=json,path={results}",
}
command = [sys.executable, "-m", "guidellm", "run", "--disable-console"]
subprocess.run([*command, *(word for option in options.items() for word in option)], check=True)
print(json.dumps(json.loads(results.read_text())))
