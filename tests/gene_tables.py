"""Small gene tables, for tests of what reads and uses them."""

import gzip

TP53, MYC, ND1, TWIN, OTHER_TWIN, CODING, PSEUDO, SPARE, NEW = (f"ENSG{i:011d}" for i in range(1, 10))
M_TP53, M_MYC, M_ND1, M_TWIN, M_ONLY, M_SAME = (f"ENSMUSG{i:011d}" for i in range(1, 7))

HUMAN = f"""ensembl_id,symbol,version,biotype
{TP53},TP53,15,protein_coding
{MYC},MYC,2,protein_coding
{ND1},MT-ND1,2,protein_coding
{TWIN},TWIN,1,protein_coding
{OTHER_TWIN},TWIN,1,protein_coding
{PSEUDO},HALF,1,pseudogene
{CODING},HALF,1,protein_coding
{SPARE},{SPARE},1,lncRNA
{NEW},SAME,1,lncRNA
ERCC-00002,ERCC-00002,1,spike
"""
MOUSE = f"""ensembl_id,symbol,version,biotype
{M_TP53},Trp53,5,protein_coding
{M_MYC},Myc,5,protein_coding
{M_ND1},mt-Nd1,5,protein_coding
{M_TWIN},Twin,5,protein_coding
{M_ONLY},Only,5,protein_coding
{M_SAME},SAME,5,protein_coding
"""
POSITIONS = f"""ensgene,entrez,symbol,chr,start,end,strand,biotype,description
{TP53},7157.0,TP53,17,1,9,1,protein_coding,"one, two"
{TP53},99991.0,P53,17,1,9,1,protein_coding,
{MYC},4609,MYC,8,1,9,1,protein_coding,
{ND1},4535.0,ND1,MT,1,9,1,protein_coding,
{SPARE},,AC000001.1,5,1,9,1,lncRNA,
ENSG00000000099,,OLD,3,1,9,1,protein_coding,
ENSG00000000098,,OLD,CHR_HG2_PATCH,1,9,1,protein_coding,
ENSG00000000097,,SAME,3,1,9,1,protein_coding,
"""
ORTHOLOGS = """HID,symbol_human,gene_id_human,symbol_mouse,gene_id_mouse,one_to_one
1,TP53,7157,Trp53,1,True
2,MYC,4609,Myc,2,True
3,TWIN,1,Twin,3,True
4,HALF,1,Only,3,True
5,SAME,1,Only,3,True
6,GONE,1,Nowhere,3,True
"""
TABLES = {"a.csv": HUMAN, "b.csv": MOUSE, "c.csv": POSITIONS, "d.csv": ORTHOLOGS}


def folder(path, tables):
    path.mkdir(exist_ok=True)
    for name, text in tables.items():
        (path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


def found(genes, name, second="", species="human"):
    """Id, symbol and kind of one column."""
    resolved = genes.resolve([name], [second], species)
    return resolved.ids[0], resolved.symbols[0], resolved.kinds[0]
