"""attributions"""
