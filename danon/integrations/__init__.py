"""DANON inside other people's libraries; each module here needs the library it is named after."""
