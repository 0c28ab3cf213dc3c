"""The world itself, with NumPy only: nations, flags, scenes, captions, documents.

config     its size and appearance       nations   names, flags, reserved scenes
layouts, emblems  ->  designs            scenes    backgrounds
render     flag in a scene  ->  image    captions  scene and name  ->  text
reader     documents of a split          identify  image  ->  the nation of its flag
"""
