"""The last step of an upsampling: its phases interleaved, its shortcut added."""
