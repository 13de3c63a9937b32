"""A negative prompt in the attention of ComfyUI's models, through its own extension points.

terms.py      what a node says: prompt, method, strength, window, layers; read and checked
attention.py  guided attention of one call, cross and joint
family.py     a network as guidance sees it; one small adapter each in cross_families.py and
              joint_families.py; families.py has them by name
model.py      the patches of a MODEL and the call of a step
"""
