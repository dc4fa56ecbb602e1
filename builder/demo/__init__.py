"""The world the demo models are trained on, and how a video of it is judged.

colours.py      named colours, and which of them a pixel has
motion.py       verbs, speeds, and how much of each has happened at a time
scene.py        what a picture holds and what happens in it; the draws for training and for tests
world.py        scene → frames, on any device
photographs.py  the pictures behind the shapes and before the camera, split into seen and unseen
prompts.py      what happens → words
tracks.py       frames → where a colour is: centre, size, angle
flow.py         frames → what the camera did
measure.py      frames and what was asked → was it done, and how far
similarity.py   PSNR and SSIM
"""
