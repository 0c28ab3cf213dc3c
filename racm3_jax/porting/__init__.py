"""Imports and exports weights of other projects in NumPy, without torch or pickle.

tensors    the interface of tensor sources; safetensors, read one tensor at a time
pickles    pickles without unpickling: tensors and plain containers only
pickled    their results: tensors as views of storages, inert records of all else
torch_files  files of `torch.save`; the choice between several sets of weights
files      a file, a folder or `hub:owner/name` -> one source, sharded or not
rules      one rule per parameter: name and form there and here; key differences
writing    our weights directories and safetensors, streamed, with checksums
clip       OpenAI, Hugging Face and OpenCLIP layouts
clip_text  CLIP's merges -> a TextTokenizer
vqgan      taming (Gumbel too), Chameleon's, diffusers' VQModel
chameleon  native, Anole's, Lumina's, Hugging Face's; vocabulary by name
export     to the formats of `transformers`
"""
