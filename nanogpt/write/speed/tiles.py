"""Register tiles for matrix products in numba: some rows of weights times some rows of activations at once.

Every product keeps a vector of partial sums in a register of its own; LLVM makes the code, without a C++ compiler.
"""

# 矩阵乘的内核：几行权重 x 几行激活，每个积各用一个向量累加器，都留在寄存器里，读一次用几次
# numba 自己的向量化做不到：这里直接写 LLVM IR；数的格式由 integer_dot（int8）与 float_dot（float32）给
# 每个积的求和次序与块的形状无关：旁边有几行，结果的每一位都一样

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

INT8, INT32, INT64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
# 提前多少字节去要权重：够等一次内存，又留在 L2 里
AHEAD = 12 * 1024


def row_length(size: int, itemsize: int) -> int:
    """Elements from one row of activations to the next, so that several rows fit into L1."""
    # 每行都从页里同一处开始的，同一列的几行落在 L1 的同一组里，组里只有八个位子：32 行、宽 3072 的 fp32 慢一半
    return size + (64 // itemsize if size * itemsize % 4096 == 0 else 0)


def declared(builder, name: str, returns, takes) -> ir.Function:
    """An LLVM intrinsic."""
    return builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(returns, takes), name)


def _added_up(builder, vectors: list, add: str) -> list:
    """The sum of every vector's lanes, in order, as many in one vector as it has lanes; the last has others behind."""
    # 相邻两数相加，直到每个累加器剩一个数：两个累加器挤进一个，比逐个横着加少一大半指令
    lanes = vectors[0].type.count

    def picked(a, b, first):
        places = ir.Constant(ir.VectorType(INT32, lanes), list(range(first, 2 * lanes, 2)))
        return builder.shuffle_vector(a, b, places)

    for _ in range(lanes.bit_length() - 1):
        pairs = zip(vectors[::2], [*vectors[1::2], *vectors[-1:]])
        vectors = [getattr(builder, add)(*(picked(a, b, first) for first in (0, 1))) for a, b in pairs]
    return vectors


def _keep(builder, vectors: list, first: int, count: int, out, offset: int) -> None:
    """Store `count` lanes from `first` on, counted through all vectors, at out[offset]."""
    lanes = vectors[0].type.count
    whole, first = divmod(first, lanes)
    places = ir.Constant(ir.VectorType(INT32, count), list(range(first, first + count)))
    part = builder.shuffle_vector(vectors[whole], vectors[min(whole + 1, len(vectors) - 1)], places)
    store(builder, part, out, ir.Constant(INT64, offset))


def tile_of(
    rows: int, columns: int, *, vector, sums, step: int, multiple: int, prepare, multiply, add: str, chunk: int,
    asks: int,
):
    """dot(w, w_stride, x, x_stride, k, ahead, out): out[c * chunk + r] = products of the first k of w[r] and x[c].

    r < rows, c < columns; rows begin a stride behind the one before. `asks` rows of weights that lie one behind the
    other from `ahead` on are asked for on the way.

    `step` elements are read at a time, as vector(their numba type), up to k // multiple * multiple, which must not be
    0. `multiply` (builder, total, weight, act) adds to a vector of `sums`, `prepare` (builder, weight) comes first;
    `add` names the builder's addition of such vectors.
    """

    def generate(context, builder, signature, args):
        w, w_stride, x, x_stride, k, ahead, out = args
        # 调用它的函数不再并进上一层：每并一层就要重新优化、生成一遍，第一次编译多等几秒
        builder.function.attributes.add("noinline")

        def constant(number):
            return ir.Constant(INT64, number)

        def row_of(start, of, stride, row, i):
            place = builder.add(i, builder.mul(stride, constant(row)))
            return load(builder, start, place, vector(of.dtype), 1)

        def added(i, totals):
            for r in range(asks):
                # 几行权重交替着读，硬件认不出次序，只剩三分之一的带宽；按内存的次序先要，就又是全速
                ask_ahead(builder, ahead, builder.add(builder.mul(i, constant(asks)), constant(r * step)), 0)
            weights = [prepare(builder, row_of(w, signature.args[0], w_stride, r, i)) for r in range(rows)]
            after = list(totals)
            for c in range(columns):
                act = row_of(x, signature.args[2], x_stride, c, i)
                for r in range(rows):
                    # 同一行激活的排在一起：几行权重的结果一次写下
                    after[c * rows + r] = multiply(builder, totals[c * rows + r], weights[r], act)
            return after

        end = builder.and_(k, ir.Constant(INT64, -multiple))
        whole = _added_up(builder, loop(builder, end, step, sums, rows * columns, added), add)
        for c in range(columns):
            _keep(builder, whole, c * rows, rows, out, c * chunk)
        return context.get_dummy_value()

    @intrinsic
    def dot(typing, w, w_stride, x, x_stride, k, ahead, out):
        return types.void(w, types.intp, x, types.intp, types.intp, ahead, out), generate

    return dot


def turn_of(size: int):
    """turn(start, stride, out, out_stride): out[c * out_stride + r] = start[r * stride + c], r, c < size, of 4 bytes.

    `size` is a power of two.
    """
    vector = ir.VectorType(INT32, size)

    def generate(context, builder, signature, args):
        start, stride, out, out_stride = args
        builder.function.attributes.add("noinline")

        def place(apart, row):
            return builder.mul(apart, ir.Constant(INT64, row))

        rows = [load(builder, start, place(stride, r), vector, 4) for r in range(size)]
        # 隔一半的两条交错着合成两条，几遍之后行就成了列
        halves = [
            ir.Constant(vector, [n for i in range(first, first + size // 2) for n in (i, i + size)])
            for first in (0, size // 2)
        ]
        for _ in range(size.bit_length() - 1):
            pairs = zip(rows[: size // 2], rows[size // 2 :], strict=True)
            rows = [builder.shuffle_vector(a, b, half) for a, b in pairs for half in halves]
        for c, row in enumerate(rows):
            store(builder, row, out, place(out_stride, c))
        return context.get_dummy_value()

    @intrinsic
    def turn(typing, start, stride, out, out_stride):
        return types.void(start, types.intp, out, types.intp), generate

    return turn


def load(builder, start, offset, kind, align: int):
    """What lies at start[offset], as another type."""
    value = builder.load(builder.bitcast(builder.gep(start, [offset]), kind.as_pointer()))
    value.align = align
    return value


def store(builder, value, start, offset) -> None:
    """Write a vector of 4-byte numbers at start[offset]."""
    builder.store(value, builder.bitcast(builder.gep(start, [offset]), value.type.as_pointer())).align = 4


def loop(builder, end, step: int, kind, count: int, added, first: list | None = None) -> list:
    """What `count` sums of a kind are behind a loop: added(i, sums) makes them anew for i = 0, step … end.

    They begin as `first`, or as 0.

    It is gone through once at least.
    """
    entry, body, done = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.branch(body)
    builder.position_at_end(body)
    i, totals = builder.phi(INT64), [builder.phi(kind) for _ in range(count)]
    after = added(i, totals)
    following = builder.add(i, ir.Constant(INT64, step))
    starts = first or [ir.Constant(kind, None)] * count
    for phi, start, value in ((i, ir.Constant(INT64, 0), following), *zip(totals, starts, after, strict=True)):
        phi.add_incoming(start, entry)
        phi.add_incoming(value, body)
    builder.cbranch(builder.icmp_signed("<", following, end), body, done)
    builder.position_at_end(done)
    return after


def fused(builder, a, b, c):
    """a * b + c of vectors of float32."""
    # 有 FMA 指令就合并，没有就先乘后加
    function = declared(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, [a.type] * 3)
    return builder.call(function, [a, b, c])


def splat(builder, value, lanes: int):
    """A vector of as many times the same value."""
    kind, places = ir.VectorType(value.type, lanes), ir.Constant(ir.VectorType(INT32, lanes), [0] * lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(INT32, 0))
    return builder.shuffle_vector(first, first, places)


def ask_ahead(builder, start, offset, by: int = AHEAD) -> None:
    """Ask for the line of memory some bytes behind start[offset]."""
    place = builder.bitcast(builder.gep(start, [offset]), INT8.as_pointer())
    _ask(builder, builder.gep(place, [ir.Constant(INT64, by)]), 0)


def _ask(builder, place, to_write: int) -> None:
    # 要到 L2 为止：直接要进 L1 的，等着的位子只有二十来个，float32 的 8 行激活慢一半多
    hint = declared(builder, "llvm.prefetch.p0", ir.VoidType(), [INT8.as_pointer(), INT32, INT32, INT32])
    builder.call(hint, [place, *(ir.Constant(INT32, n) for n in (to_write, 2, 1))])


@intrinsic
def ask_to_write(typing, pointer):
    """Ask for the line of memory that a pointer points to, which is written soon."""

    def generate(context, builder, signature, args):
        _ask(builder, builder.bitcast(args[0], INT8.as_pointer()), 1)
        return context.get_dummy_value()

    return types.void(pointer), generate


@intrinsic
def at(typing, array, offset):
    """Pointer to the element of a contiguous array at a flat offset.

    It keeps no array alive: one made in a kernel is freed behind its last use there, so take the pointer where it is
    used, inside of the loop.
    """

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.gep(data, [args[1]])

    return types.CPointer(array.dtype)(array, types.intp), generate


@intrinsic
def shifted(typing, pointer, offset):
    """Pointer to the element so many behind that of another."""

    def generate(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), generate
