"""Names of the model's parameters here, in the official Mask2Former and in Hugging Face's checkpoint files.

    state_dict = convert_state_dict(state_dict)  # official or Hugging Face -> `model.Mask2Former`
    state_dict = translate_state_dict(state_dict, OURS, OFFICIAL)

The table covers ResNet and Swin backbones."""

import re

import torch

# Each row names one parameter: ours | official | Hugging Face. A line without indentation has the prefixes of
# the rows below it. # is a number and @ a word that all three share. A suffix such as .weight is shared too.
# <n> stands for 0 to 4, and <n+1> for one more. {q,k,v} are three parameters that the others store as one.
_NAMES = """
pixel_decoder. | sem_seg_head.pixel_decoder. | model.pixel_level_module.decoder.
    input_proj.#.#        | input_proj.#.#          | input_projections.#.#
    level_embed           | transformer.level_embed | level_embed
    lateral.0             | adapter_1               | adapter_1.0
    lateral.1             | adapter_1.norm          | adapter_1.1
    output.0              | layer_1                 | layer_1.0
    output.1              | layer_1.norm            | layer_1.1
    mask_features         | mask_features           | mask_projection
pixel_decoder. | sem_seg_head.pixel_decoder.transformer.encoder. | model.pixel_level_module.decoder.encoder.
    layers.#.self_attn.@  | layers.#.self_attn.@    | layers.#.self_attn.@
    layers.#.norm1        | layers.#.norm1          | layers.#.self_attn_layer_norm
    layers.#.ffn.0        | layers.#.linear1        | layers.#.fc1
    layers.#.ffn.2        | layers.#.linear2        | layers.#.fc2
    layers.#.norm2        | layers.#.norm2          | layers.#.final_layer_norm
decoder. | sem_seg_head.predictor. | model.transformer_module.
    query_features        | query_feat              | queries_features
    query_features        | static_query            | queries_features
    query_positions       | query_embed             | queries_embedder
    level_embed           | level_embed             | level_embed
    norm                  | decoder_norm            | decoder.layernorm
    mask_head.0           | mask_embed.layers.0     | decoder.mask_predictor.mask_embedder.0.0
    mask_head.2           | mask_embed.layers.1     | decoder.mask_predictor.mask_embedder.1.0
    mask_head.4           | mask_embed.layers.2     | decoder.mask_predictor.mask_embedder.2.0
decoder. | sem_seg_head.predictor. |
    class_head            | class_embed             | class_predictor
decoder.layers.#. | sem_seg_head.predictor.transformer_cross_attention_layers.#. | model.transformer_module.decoder.layers.#.
    cross_attn            | multihead_attn          | cross_attn
    cross_attn.out_proj   | multihead_attn.out_proj | cross_attn.out_proj
    norm1                 | norm                    | cross_attn_layer_norm
decoder.layers.#. | sem_seg_head.predictor.transformer_self_attention_layers.#. | model.transformer_module.decoder.layers.#.
    self_attn.in_proj_weight | self_attn.in_proj_weight | self_attn.{q,k,v}_proj.weight
    self_attn.in_proj_bias   | self_attn.in_proj_bias   | self_attn.{q,k,v}_proj.bias
    self_attn.out_proj    | self_attn.out_proj      | self_attn.out_proj
    norm2                 | norm                    | self_attn_layer_norm
decoder.layers.#. | sem_seg_head.predictor.transformer_ffn_layers.#. | model.transformer_module.decoder.layers.#.
    ffn.0                 | linear1                 | fc1
    ffn.2                 | linear2                 | fc2
    norm3                 | norm                    | final_layer_norm
backbone.body. | backbone. | model.pixel_level_module.encoder._backbone.
    conv1                 | stem.conv1              | conv1
    bn1                   | stem.conv1.norm         | bn1
    layer<n>.#.conv#      | res<n+1>.#.conv#        | layer<n>.#.conv#
    layer<n>.#.bn#        | res<n+1>.#.conv#.norm   | layer<n>.#.bn#
    layer<n>.#.downsample.0 | res<n+1>.#.shortcut   | layer<n>.#.downsample.0
    layer<n>.#.downsample.1 | res<n+1>.#.shortcut.norm | layer<n>.#.downsample.1
backbone. | backbone. | model.pixel_level_module.encoder.
    body.patch_embed.proj | patch_embed.proj        | embeddings.patch_embeddings.projection
    body.patch_embed.norm | patch_embed.norm        | embeddings.norm
    body.layers_<n>.downsample.@ | layers.<n-1>.downsample.@ | encoder.layers.<n-1>.downsample.@
    norms.<n>             | norm<n>                 | hidden_states_norms.stage<n+1>
backbone.body.layers_#.blocks.#. | backbone.layers.#.blocks.#. | model.pixel_level_module.encoder.encoder.layers.#.blocks.#.
    norm1                 | norm1                   | layernorm_before
    norm2                 | norm2                   | layernorm_after
    attn                  | attn                    | attention.self
    attn.qkv.weight       | attn.qkv.weight         | attention.self.{query,key,value}.weight
    attn.qkv.bias         | attn.qkv.bias           | attention.self.{query,key,value}.bias
    attn.proj             | attn.proj               | attention.output.dense
    mlp.fc1               | mlp.fc1                 | intermediate.dense
    mlp.fc2               | mlp.fc2                 | output.dense
"""  # noqa: E501
OURS, OFFICIAL, HUGGING_FACE = 0, 1, 2  # the columns of _NAMES
# Other files also hold constants, counters, and a last norm of Swin that nothing uses.
_NOT_PARAMETERS = re.compile(
    r".*\.(num_batches_tracked|relative_position_index)|criterion\.empty_weight|pixel_(mean|std)"
    r"|model\.pixel_level_module\.encoder\.(swin\.)?layernorm\.(weight|bias)"
)


def convert_state_dict(state_dict: dict) -> dict:
    """Convert a state dict of the official Mask2Former or of Hugging Face to the names of `Mask2Former`.

    Raises ValueError for an unknown parameter name."""
    if any(name.startswith("sem_seg_head.") for name in state_dict):
        return translate_state_dict(state_dict, OFFICIAL, OURS)
    if any(name.startswith("model.pixel_level_module.") for name in state_dict):
        return translate_state_dict(state_dict, HUGGING_FACE, OURS)
    raise ValueError("these are neither the official Mask2Former's parameters nor Hugging Face's")


def translate_state_dict(state_dict: dict, source: int, target: int) -> dict:
    """Rename the parameters of a state dict from one column of _NAMES to another, and split or merge q, k, v.

    Entries that are not parameters are left out. Raises ValueError for a name that is not in the table."""
    rules = []
    for row in _name_rows():
        for part, name in enumerate(_expand_braces(row[source])):
            pattern = re.escape(name).replace(r"\#", r"(\d+)").replace("@", r"(\w+)") + r"(\.\w+)?"
            rules.append(
                (re.compile(pattern), _expand_braces(row[target]), part if "{" in row[source] else None)
            )
    result, qkv_parts = {}, {}
    for name, value in state_dict.items():
        if _NOT_PARAMETERS.fullmatch(name):
            continue
        matches = ((pattern.fullmatch(name), *rule) for pattern, *rule in rules)
        match, templates, part = next((rule for rule in matches if rule[0]), (None, None, None))
        if match is None:
            raise ValueError(f"unknown parameter {name!r}")
        *words, suffix = match.groups(default="")
        names = [re.sub("[#@]", "{}", template).format(*words) + suffix for template in templates]
        if len(names) > 1:  # one parameter becomes q, k, v
            result.update(zip(names, value.chunk(len(names))))
        elif part is not None:  # q, k, v become one parameter
            qkv_parts.setdefault(names[0], {})[part] = value
        else:
            result[names[0]] = value
    for name, parts in qkv_parts.items():
        if len(parts) < 3:
            raise ValueError(f"one of the three parameters that make {name!r} is missing")
        result[name] = torch.cat([parts[part] for part in range(3)])
    return result


def _name_rows() -> list[list[str]]:
    """Parse _NAMES: a row of three full names for each line and each n."""
    rows, prefixes = [], []
    for line in _NAMES.strip().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if not line.startswith(" "):
            prefixes = cells
            continue
        for n in range(5) if "<n" in line else [0]:
            numbered = [re.sub(r"<n([+-]1)?>", lambda m, n=n: str(n + int(m[1] or 0)), c) for c in cells]
            rows.append([prefix + cell for prefix, cell in zip(prefixes, numbered)])
    return rows


def _expand_braces(name: str) -> list[str]:
    """Expand "a.{q,k,v}.b" to ["a.q.b", "a.k.b", "a.v.b"]. A name without braces becomes a list of one."""
    match = re.search(r"{(.*)}", name)
    return [name.replace(match[0], word) for word in match[1].split(",")] if match else [name]
