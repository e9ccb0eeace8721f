"""Change the weights of a model: conversion from dense to MoE, and the demo model made by it."""
