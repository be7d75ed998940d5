"""The structs of layer.h and gemm.h, field by field."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p


class WeightStruct(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("steps", c_int64), ("panels", c_int64), ("outputs", c_int64))


class ProjectionStruct(ctypes.Structure):
    _fields_ = (("weight", WeightStruct), ("a", c_void_p), ("b", c_void_p))


class LayerStruct(ctypes.Structure):
    _fields_ = (
        ("qkv", ProjectionStruct),
        ("out", ProjectionStruct),
        ("gate_up", ProjectionStruct),
        ("down", ProjectionStruct),
        ("attention_gain", c_void_p),
        ("mlp_gain", c_void_p),
        ("gain_stride", c_int64),
        ("bias", c_void_p),
        ("q_gain", c_void_p),
        ("k_gain", c_void_p),
    )


class GroupStruct(ctypes.Structure):
    _fields_ = (
        ("layers", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("count", c_int64),
        ("width", c_int64),
        ("recursions", c_int64),
        ("low_rank", c_int64),
        ("query_heads", c_int32),
        ("key_heads", c_int32),
        ("head_size", c_int32),
        ("is_bf16", c_int32),
        ("eps", c_float),
    )


class RowsStruct(ctypes.Structure):
    _fields_ = (
        ("position", c_void_p),
        ("recursion", c_void_p),
        ("table", c_void_p),
        ("count", c_void_p),
        ("slot", c_void_p),
        ("tables", c_void_p),
        ("recursion_starts", c_void_p),
        ("pool", c_void_p),
        ("rows", c_int64),
        ("num_kv_rows", c_int64),
        ("num_full_rows", c_int64),
        ("tables_stride", c_int64),
        ("page_stride", c_int64),
        ("layer_stride", c_int64),
        ("page_tokens", c_int64),
        ("first_kv_layer", c_int64),
    )
