"""Weights of other projects in and out, in NumPy: no torch, no code from the files.

tensors    what a source of tensors is; safetensors, read one tensor at a time
pickles    pickles without unpickling: tensors and plain containers only
pickled    what comes out: tensors as views of storages, inert notes of all else
torch_files  what `torch.save` writes; which of several sets of weights is taken
files      a file, a folder or `hub:owner/name` -> one source, sharded or not
rules      one rule a parameter: its name and form there and here; key differences
writing    our weights directories and safetensors, streamed, sealed
clip       OpenAI, Hugging Face and OpenCLIP layouts
clip_text  CLIP's merges -> a TextTokenizer
vqgan      taming (Gumbel too), Chameleon's, diffusers' VQModel
chameleon  native, Anole's, Lumina's, Hugging Face's; vocabulary by name
export     back to what `transformers` loads
"""
