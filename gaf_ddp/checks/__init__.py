"""Do all ranks compute and hold the same?"""
