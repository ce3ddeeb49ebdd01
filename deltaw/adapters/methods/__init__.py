"""The methods: a file each with its config, parameters, ΔW and forward, and one more for each further kind of layer."""
