"""Two users' answers over OpenAI's protocol, one of them streamed: python examples/openai_client.py [URL]

It needs OpenAI's package: pip install openai

URL is the address that `psoups serve --base tiny --experts quickstart/experts --profiles profiles.db` prints, with /v1.
"""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
base = client.models.list().data[0].id
messages = [{"role": "user", "content": "How do I clean an old kettle?"}]

# a stored profile: the model's name says whose
profile = {"weights": {"expert": 0.6, "concise": 0.6, "unfriendly": 0.6}}
client.put("/profiles/ada", body=profile, cast_to=object)
answer = client.chat.completions.create(model="soup:ada", messages=messages, seed=1)
print(f"{answer.model}: {answer.choices[0].message.content}")

# a profile that is sent with the request
profile = {"weights": {"elementary": 0.6, "informative": 0.6, "friendly": 0.6}}
stream = client.chat.completions.create(
    model=base, messages=messages, seed=1, stream=True, extra_body={"profile": profile}
)
print("of the moment: ", end="")
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
