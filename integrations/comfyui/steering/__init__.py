"""A negative prompt in the attention of ComfyUI's models, through its own extension points.

terms.py      what a node says: prompt, method, strength, window, layers; read and checked
attention.py  guided attention of one call, cross and joint
families.py   what differs between networks: one small adapter each
model.py      the patches of a MODEL and the call of a step
"""
