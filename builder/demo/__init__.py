"""The world the demo models are trained on, how they are trained, and how a video of it is judged.

The world
    colours.py        named colours, and which of them a pixel has
    motion.py         verbs, speeds, and how much of each has happened at a time
    scene.py          what a picture holds and what happens in it; the draws for training and for tests
    world.py          scene → frames, on any device
    photographs.py    the pictures behind the shapes and before the camera, split into seen and unseen
    prompts.py        what happens → words

Training
    train.py          the command: from nothing to a folder that the worker loads
    encoders.py       tokenizers and frozen random encoders
    autoencoder.py    the VAE
    bank.py           clips as latents, with their prompts
    layouts.py        a clip's latents → one section and the history it sees
    flow_matching.py  the loss, the noise levels, averaged weights
    transformer.py    the transformer

Judging
    tracks.py         frames → where a colour is: centre, size, angle
    flow.py           frames → what the camera did
    measure.py        frames and what was asked → was it done, and how far
    controls.py       wrong prompts, which must not be found followed
    similarity.py     PSNR and SSIM
"""
