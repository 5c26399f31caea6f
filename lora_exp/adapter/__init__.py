"""An adapter: put on, saved, refused, several.

untrusted  files from anywhere: names, numbers only
mounting   a saved adapter mounted, or refused
attach     resolve targets, attach, save
several    several adapters on one base
"""
