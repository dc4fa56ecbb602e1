"""Write the request's JSON schema into docs/in_out_spec.md, between its two markers.

python -m builder.export_schema docs/in_out_spec.md
"""

import json
import sys
from pathlib import Path

from core.request import VideoRequest

BEGIN, END = "<!-- schema: begin -->", "<!-- schema: end -->"


def with_schema(text: str) -> str:
    """`text` with whatever stands between the markers replaced by the current schema."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    schema = json.dumps(VideoRequest.model_json_schema(), indent=2, ensure_ascii=False)
    return f"{before}{BEGIN}\n```json\n{schema}\n```\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_schema(path.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"Schema written to {path}")
