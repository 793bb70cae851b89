"""Recipes: functions that return a `cellray.train.recipe.Recipe`."""
