"""An adapter: put on, saved, refused, several.

untrusted  untrusted files: no patterns, no code
mounting   a saved adapter mounted, or refused
attach     resolve targets, attach, save
several    several adapters on one base
"""
